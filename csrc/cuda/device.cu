// Facts of a GPU; no kernel.
#include "device.h"

#include "primitives.cuh"

namespace theseus::cuda {

const char* find_device(int index, Device& device) {
  const char* error = ask(Fact::processors, index, device.processors);
  if (!error) error = ask(Fact::shared_limit, index, device.shared_limit);
  if (!error) error = ask(Fact::major, index, device.major);
  if (!error) error = ask(Fact::minor, index, device.minor);
  return error;
}

}  // namespace theseus::cuda
