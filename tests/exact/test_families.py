"""Exact controls of the other families, dense and through PEFT's files; a family's table is a line in `pairs_*.py`.

Which control a planted bug turns red stands in `tests/planted/bugs.py`.
"""

import pytest
import theseus_transport as tt
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from .controls import adapter_error, cases, error
from .families import SIGLIP
from .models import LORA_RANK, TOLERANCE, base, batches
from .pairs_text import SAME, TEXT
from .pairs_vision import VISION

TABLES = {**TEXT, **VISION}
DENSE = [case for family, table in TABLES.items() for case in cases(family, table, lora=False)]
LORA = [case for family, table in TABLES.items() for case in cases(family, table, lora=True)]


@pytest.fixture(autouse=True, scope="module")
def home_made_family():
    """The table a user writes for a model of their own: the same names as in the test's record."""
    tt.register(
        tt.Family(
            model_type="home-made",
            modality="text",
            norm="layer",
            blocks="stack",
            attention_norm="before",
            mlp_norm="between",
            query="ask",
            key="offer",
            value="carry",
            output="merge",
            expand=("widen",),
            contract="narrow",
            final_norm="last",
            embeddings=(tt.Embedding("token", "words.weight", 1), tt.Embedding("position", "places.weight", 1)),
            heads={"vocabulary": "read"},
        )
    )


@pytest.mark.parametrize("pair, kind", DENSE)
def test_exact(pair, kind):
    assert error(pair, kind) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("pair, kind", [c for c in DENSE if c.values[1] == "everything" and not c.values[0].narrow])
def test_exact_in_float32(pair, kind):
    assert error(pair, kind, torch.float32) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("pair, kind", LORA)
def test_adapter_is_exact(pair, kind, tmp_path):
    """The target is read through PEFT again, but a tower that PEFT cannot wrap takes the product itself."""
    assert adapter_error(pair, tmp_path) <= TOLERANCE[torch.float64]


def test_ranks_add_where_layers_are_fused(tmp_path):
    """Separate factors of q and v, as a user's model has them, become factors of GPT-2's c_attn of twice the rank."""
    adapter_error(next(pair for pair in TEXT["cross"] if pair.name == "home-to-gpt2"), tmp_path)
    factors = load_file(tmp_path / "target" / "adapter_model.safetensors")
    ranks = {name: min(value.shape) for name, value in factors.items()}
    assert len(ranks) == 2 * 2 * 2 and all(("c_attn" in n) == (r == 2 * LORA_RANK) for n, r in ranks.items()), ranks


def test_a_pooling_head_stays_by_rule():
    source, target = (base(SIGLIP, seed=seed) for seed in (0, 5))
    models = source.build(), target.build()
    tuned = {name: value + 1 for name, value in models[0].state_dict().items()}
    alignment = tt.align(*models, batches(source, seed=3, count=1))
    update = tt.transport(alignment, tt.Delta.between(models[0], tuned), models[1])
    fates = {row.tensor: (row.fate, row.note) for row in update.coverage}
    assert {fate for fate, _ in (fates[name] for name in fates if name.startswith("head."))} == {"left"}
    assert "pooling head" in fates["head.probe"][1] and not any(name.startswith("head.") for name in update)


def test_a_post_norm_model_is_refused_by_name():
    sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=40, vocab_size=60)
    source = SAME()
    with pytest.raises(tt.InputRefused, match=r"'bert'.*post-norm"):
        tt.align(BertModel(BertConfig(**sizes)), BertModel(BertConfig(**sizes)), batches(source, seed=3))
