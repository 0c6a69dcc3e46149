"""Weights on their way to a device: on a simulated one, as late as a stream may be; on a GPU where there is one."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.simulated_device import BUFFER, Simulated, bits, simulated_devices
from safetensors.torch import load_file, save_file
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models.geometry import Geometry
from theseus_transport.streaming import upload as module
from theseus_transport.streaming.skeleton import Skeleton
from theseus_transport.streaming.upload import RING, Upload
from theseus_transport.streaming.window import Window
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DEPTH = 5
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (0, 3), (5,), (16,), (17,), (32,), (7, 23))  # none, less than a piece, one, a little more, two, many


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[Simulated]:
    return simulated_devices(monkeypatch)


def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


# --- the ring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_arrive_in_pieces(dtype: torch.dtype, machines: list[Simulated]) -> None:
    """Many tensors one after the other, each larger or smaller than a buffer; converted as the CPU converts."""
    uploads = Upload(CPU, [])
    given = [values(shape, dtype) for shape in SHAPES for _ in range(3)]
    for to in (dtype, torch.float64):
        sent = [uploads.bring(tensor, to) for tensor in given]
        assert [bits(s) for s in sent] == [bits(g.to(to)) for g in given]
        assert all(s.shape == g.shape and s.dtype == to for s, g in zip(sent, given, strict=True))
    assert machines[0].pinned_bytes == RING * BUFFER, "buffers are made once"


def test_a_buffer_is_filled_again_only_once_it_was_copied(machines: list[Simulated]) -> None:
    """While nobody computes, no copy is waited for but by who wants its buffer."""
    uploads = Upload(CPU, ["w"])
    weight, send = values((8 * BUFFER // 4,), torch.float32), uploads.ahead()
    send("w", weight)
    assert machines[0].copied == 8 - RING, "a buffer is filled while the other is copied"
    assert bits(uploads.take("w", weight, torch.float32)) == bits(weight)


def test_computing_waits_for_what_it_uses(machines: list[Simulated]) -> None:
    uploads, small = Upload(CPU, ["w"]), values((3,), torch.float32)
    send = uploads.ahead()
    send("w", small)
    assert machines[0].copied == 0, "nobody has waited yet"
    taken = uploads.take("w", small, torch.float32)
    assert bits(taken) == bits(small) and machines[0].memory[0].used
    now = uploads.take("w", small, torch.float32)
    assert bits(now) == bits(small) and now.data_ptr() != taken.data_ptr(), "what was taken is not kept"


# --- slots -----------------------------------------------------------------------------------------------------------


def test_more_blocks_than_slots_are_not_kept(machines: list[Simulated]) -> None:
    """The oldest goes, and what comes too late for it is not sent."""
    tensors = {f"{b}": values((10,), torch.float32) for b in range(4)}
    uploads, sends = Upload(CPU, tensors), []
    for name, tensor in tensors.items():
        sends.append(uploads.ahead())
        sends[-1](name, tensor)
        machines[0].run(len(machines[0].copies))
    assert machines[0].peak == machines[0].in_use == 2 * 40
    sends[0]("1", tensors["1"])
    sends[3]("no weight", tensors["1"])
    assert len(machines[0].memory) == len(tensors)
    uploads.drop(["3"])
    assert machines[0].in_use == 40


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A llama of equal blocks."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(**sizes, vocab_size=20)).to(request.param).save_pretrained(folder)
    return Checkpoint.open(folder)


def walked(checkpoint: Checkpoint, device: torch.device) -> Iterator[int]:
    """The loop's order over all blocks, the next always read ahead; their bytes as stored."""
    geometry, stored = Geometry.of(checkpoint.config), load_file(checkpoint.files[0])
    blocks = geometry.family.by_block(checkpoint)
    with Window(checkpoint) as window:
        skeleton = Skeleton(window, geometry, device)
        window.send_to(skeleton.upload)
        for b in range(DEPTH):
            window.hold(blocks[b])
            window.prefetch(blocks.get(b + 1, []))
            with skeleton.filled(b) as block:
                for name, weight in block.named_parameters():
                    (found,) = (n for n in blocks[b] if n.endswith(name))
                    assert weight.device.type == device.type and weight.dtype is torch.float32
                    assert bits(weight) == bits(stored[found].float()), found
                del weight  # as the loop does: nothing stays of a block
                yield sum(stored[name].nbytes for name in blocks[b])
            window.release()


def test_no_more_than_two_blocks_are_on_the_device(checkpoint: Checkpoint, machines: list[Simulated]) -> None:
    sizes = list(walked(checkpoint, CPU))
    assert len(sizes) == DEPTH and len(set(sizes)) == 1
    assert machines[0].peak == 2 * sizes[0] and machines[0].pinned_bytes == RING * BUFFER


def test_what_was_sent_ahead_is_not_sent_again(checkpoint: Checkpoint, machines: list[Simulated]) -> None:
    assert len(list(walked(checkpoint, CPU))) == DEPTH
    assert len(machines[0].memory) == sum(map(len, Geometry.of(checkpoint.config).family.by_block(checkpoint).values()))


# --- the window ------------------------------------------------------------------------------------------------------


@pytest.fixture
def upload(machines: list[Simulated]) -> Upload:
    return Upload(CPU, ["a", "b"])


@pytest.fixture
def window(tmp_path: Path, upload: Upload) -> Iterator[Window]:
    save_file({name: values((30,), torch.float32) for name in ("a", "b", "odd")}, tmp_path / "model.safetensors")
    with Window(Checkpoint.open(tmp_path)) as window:
        window.send_to(upload)
        yield window


def test_only_what_will_be_taken_is_sent(window: Window, upload: Upload, machines: list[Simulated]) -> None:
    window.prefetch(window)
    window.hold(window)
    assert len(machines[0].memory) == 2 and window.held_bytes == 3 * 120
    window.hold(window)
    window.prefetch(window)
    assert len(machines[0].memory) == 2 and len(upload._slots) == 1, "what is held opens no slot"


@pytest.mark.parametrize("how", ["release", "close"])
def test_what_is_let_go_is_freed_on_the_device(how: str, window: Window, machines: list[Simulated]) -> None:
    window.prefetch(["a", "b"])
    window._coming["b"].result()
    machines[0].run(len(machines[0].copies))
    assert machines[0].in_use == 2 * 120
    window.release(["a"]) if how == "release" else window.close()
    assert machines[0].in_use == (120 if how == "release" else 0)


def test_a_copy_that_failed_is_told_where_it_is_wanted(
    window: Window, upload: Upload, machines: list[Simulated]
) -> None:
    machines[0].fails = True
    window.prefetch(["a", "b"])
    for name in "ab":
        with pytest.raises(RuntimeError, match="fell off the bus"):
            window.hold([name])
    assert window.held_bytes == 0 and not any(slot.sent for slot in upload._slots)
    machines[0].fails = False
    window.hold(["a"])
    assert bits(upload.take("a", window["a"], torch.float32)) == bits(window["a"])


def test_on_the_cpu_weights_share_the_window_s_memory() -> None:
    uploads, weight = Upload(CPU, ["w"]), values((7, 3), torch.float32)
    uploads.ahead()("w", weight)
    assert uploads.take("w", weight, torch.float32) is weight and uploads.bring(weight, torch.float32) is weight
    assert bits(uploads.take("w", weight.half(), torch.float32)) == bits(weight.half().float())


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_arrive_on_a_gpu(gpu: None, dtype: torch.dtype) -> None:
    """Five buffers and a little, twice, ahead and at once: through the whole ring again and again."""
    torch.manual_seed(0)
    weight = torch.randint(-(2**7), 2**7, (5 * module.BUFFER + 24,), dtype=torch.int8).view(dtype)
    uploads = Upload(CUDA, ["w"])
    for _ in range(2):
        thread = threading.Thread(target=uploads.ahead(), args=("w", weight))
        thread.start()
        thread.join()
        assert bits(uploads.take("w", weight, dtype)) == bits(weight)
        assert bits(uploads.bring(weight, dtype)) == bits(weight)


def test_blocks_on_a_gpu_hold_the_file_s_bits(gpu: None, checkpoint: Checkpoint) -> None:
    """In no more memory than two blocks as stored, and one converted; torch hands it out by 512 bytes."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    nbytes = max(walked(checkpoint, CUDA))
    count = max(map(len, Geometry.of(checkpoint.config).family.by_block(checkpoint).values()))
    elements = nbytes // checkpoint.dtypes[min(checkpoint)].itemsize
    converted = 0 if torch.float32 in checkpoint.dtypes.values() else 4 * elements
    tables = 1 << 14  # rotary frequencies, and rows compared above
    assert torch.cuda.max_memory_allocated() - before <= 2 * nbytes + converted + 3 * count * 512 + tables
