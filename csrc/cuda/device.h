// What the host side wants to know of a GPU. The only place that asks; no torch.
#pragma once

namespace theseus::cuda {

struct Device {
  int processors;    // multiprocessors
  int shared_limit;  // bytes of shared memory a block may ask for
  int major, minor;  // compute capability
};

// Fills `device` with the facts of GPU `index`. Returns null or CUDA's message.
const char* find_device(int index, Device& device);

}  // namespace theseus::cuda
