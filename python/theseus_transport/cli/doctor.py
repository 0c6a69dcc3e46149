"""What this installation can do: versions, the extension, devices, and one exact control run for real."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

import theseus_ext

from ..alignment.align import align
from ..updates.delta import Delta
from ..updates.transport import transport

PACKAGES = ("torch", "transformers", "peft", "safetensors", "scipy", "pyyaml", "pillow")
BOUND = 1e-9  # float64; an exact re-parametrisation leaves rounding only


def examine() -> dict[str, Any]:
    """Findings by name; ``healthy`` says whether the exact control held."""
    error = permuted_control()
    return {
        "theseus": _version("theseus-transport"),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **{f"extension {k}": v for k, v in theseus_ext.build_info().items()},
        "gpu": "; ".join(map(_gpu, range(torch.cuda.device_count()))) or "none seen by torch",
        "threads": torch.get_num_threads(),
        "exact control": f"a tiny ViT with permuted neurons: error {error:.1e} (bound {BOUND:g})",
        "healthy": error <= BOUND,
    }


def permuted_control() -> float:
    """Relative error of an update moved to the same network with its MLP neurons permuted; exact but for rounding."""
    generator = torch.Generator().manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    source, tuned, target = (ViTModel(config, add_pooling_layer=False).double().eval() for _ in range(3))
    state = {k: torch.rand(v.shape, generator=generator, dtype=v.dtype) + 0.5 for k, v in source.state_dict().items()}
    state |= {k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in state.items() if v.ndim > 1}
    moved = {
        k: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in state.items() if "mlp" in k
    }
    order = torch.randperm(12, generator=generator)

    axes = {"mlp.fc1.weight": 0, "mlp.fc1.bias": 0, "mlp.fc2.weight": 1}
    permuted = {
        k: next((v.index_select(axis, order) for end, axis in axes.items() if k.endswith(end)), v)
        for k, v in state.items()
    }
    source.load_state_dict(state)
    tuned.load_state_dict(state | moved)
    target.load_state_dict(permuted)
    images = torch.randn(20, 1, 8, 8, generator=generator, dtype=torch.float64)
    update = transport(align(source, target, [{"pixel_values": images[:16]}]), Delta.between(source, tuned), target)
    update.add_to(target)
    with torch.no_grad():
        moved, wanted, start = (m(pixel_values=images[16:]).last_hidden_state for m in (target, tuned, source))
    return float((moved - wanted).norm() / (wanted - start).norm())


def _gpu(index: int) -> str:
    problem = theseus_ext.cuda_problem(torch.device("cuda", index))
    return f"{torch.cuda.get_device_name(index)}, {problem or 'the compiled kernels run on it'}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"
