"""Exact controls through files: a PEFT adapter (rank 2 on q, v and down or fc2) becomes one of the same rank."""

import json

import pytest
import torch
from safetensors.torch import load_file

from . import pairs_llama, pairs_vit
from .controls import adapter_error, cases, error
from .models import LORA_RANK, TOLERANCE

CASES = [*cases("llama", pairs_llama.EXACT, lora=True), *cases("vit", pairs_vit.EXACT, lora=True)]


@pytest.mark.parametrize("pair, kind", CASES)
def test_adapter_is_exact(pair, kind, tmp_path):
    assert adapter_error(pair, tmp_path) <= TOLERANCE[torch.float64]
    config = json.loads((tmp_path / "target" / "adapter_config.json").read_text())
    assert config["r"] == LORA_RANK and config["peft_type"] == "LORA"
    factors = load_file(tmp_path / "target" / "adapter_model.safetensors")
    assert len(factors) == 2 * 3 * 2, sorted(factors)  # A and B, three layers, two blocks
    assert all(min(value.shape) == LORA_RANK and value.isfinite().all() for value in factors.values())


SOME = [c for c in CASES if any(part in c.id for part in ("together", "rotated", "new-gains", "copied"))]


@pytest.mark.parametrize("pair, kind", SOME)
def test_dense_product_of_the_adapter_is_exact(pair, kind):
    """The same change given as a full fine-tune."""
    assert error(pair, kind) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("pair, kind", SOME)
def test_adapter_is_exact_in_float32(pair, kind, tmp_path):
    assert adapter_error(pair, tmp_path, torch.float32) <= TOLERANCE[torch.float32]
