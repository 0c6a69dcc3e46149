"""What tests of several files share: the devices that tensors lie on, tiny models, and how long a machine is timed."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import theseus_ext


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files, and the tests of each, in a random order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (seed := config.getoption("--shuffle")) is not None:
        draw = random.Random(seed)
        files = {path: draw.random() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (files[item.path], draw.random()))


def no_cuda() -> str | None:
    """Why tests cannot run on CUDA tensors here, or None."""
    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} sees none; tests over devices ran on the CPU only"
    return theseus_ext.cuda_problem(torch.device("cuda"))


@pytest.fixture(params=["cpu"] if no_cuda() else ["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Where tensors lie: the CPU, and a GPU where there is one; random numbers begin anew."""
    torch.manual_seed(0)
    return str(request.param)


@pytest.fixture
def gpu() -> None:
    """For tests on a GPU alone: skips, and says why, where there is none."""
    if problem := no_cuda():
        pytest.skip(problem)


@pytest.fixture(autouse=True, scope="session")
def little_is_timed() -> Iterator[None]:
    """The rate of this machine, which every job measures, is measured on small matrices."""
    with pytest.MonkeyPatch.context() as patched:
        if machine := sys.modules.get("theseus_transport.machine"):  # kernels are tested without it
            from helpers import forked

            patched.setattr(machine, "TRIAL", forked.TRIAL)
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of ``tiny_models``, written once for tests that change nothing of it."""
    from helpers import tiny_models

    return tiny_models.build(tmp_path_factory.mktemp("models"))
