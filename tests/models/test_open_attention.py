"""The stand-in for torch's MultiheadAttention computes what the original does, and shows its projections to hooks."""

import pytest
import torch
from theseus_transport.models.open_attention import OpenAttention, open_attention
from torch import Tensor, nn

WIDTH, HEADS, BATCH, TOKENS = 12, 3, 2, 5
ROUNDING = {"rtol": 0, "atol": 1e-12}  # float64; outputs are of size 1


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def tokens(*, batch_first: bool, seed: int = 1) -> Tensor:
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x if batch_first else x.transpose(0, 1)


def masks() -> dict[str, Tensor | None]:
    """True, or -inf, hides a key from a query; no query is without a key."""
    causal = torch.ones(TOKENS, TOKENS).triu(1).bool()
    each = torch.rand(BATCH * HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(2)) < 0.4
    each[:, :, 0] = False
    added = torch.randn(TOKENS, TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return {
        "none": None,
        "bool": causal,
        "float": added.masked_fill(causal, -torch.inf),
        "bool-per-head": each,
        "float-per-head": added.expand_as(each).masked_fill(each, -torch.inf),
    }


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "tokens-first"])
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("mask", masks())
def test_same_output(mask: str, bias: bool, batch_first: bool) -> None:
    closed, x = attention(bias=bias, batch_first=batch_first), tokens(batch_first=batch_first)
    wanted, _ = closed(x, x, x, attn_mask=masks()[mask], need_weights=False)
    found, weights = OpenAttention(closed)(x, x, x, attn_mask=masks()[mask], need_weights=False)
    torch.testing.assert_close(found, wanted, **ROUNDING)
    assert weights is None


def test_a_hint_of_causality_does_not_replace_the_mask() -> None:
    closed, x = attention(batch_first=True), tokens(batch_first=True)
    options = {"attn_mask": masks()["bool"], "is_causal": True, "need_weights": False}
    torch.testing.assert_close(OpenAttention(closed)(x, x, x, **options)[0], closed(x, x, x, **options)[0], **ROUNDING)


@pytest.mark.parametrize("kind", ["cross", "other-values", "padded", "unbatched"])
def test_anything_else_is_the_originals(kind: str) -> None:
    closed, x, y = attention(batch_first=True), *(tokens(batch_first=True, seed=seed) for seed in (1, 4))
    padding = torch.tensor([[False] * TOKENS, [False] * (TOKENS - 2) + [True] * 2]) if kind == "padded" else None
    inputs = {"cross": (x, y, y), "other-values": (x, x, y), "unbatched": (x[0],) * 3}.get(kind, (x, x, x))
    seen: list[nn.Module] = []
    opened = OpenAttention(closed)
    opened.in_proj.register_forward_hook(lambda module, *_: seen.append(module))
    found, weights = opened(*inputs, key_padding_mask=padding)
    wanted, wanted_weights = closed(*inputs, key_padding_mask=padding)
    assert torch.equal(found, wanted) and torch.equal(weights, wanted_weights) and not seen


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "tokens-first"])
def test_hooks_see_the_projections(batch_first: bool) -> None:
    """in_proj's output is q, k and v one after the other; out_proj reads the context that makes the output."""
    closed, x = attention(batch_first=batch_first), tokens(batch_first=batch_first)
    model = nn.ModuleDict({"attn": closed})
    seen: dict[str, Tensor] = {}
    with open_attention(model):
        assert isinstance(model["attn"], OpenAttention)
        model["attn"].in_proj.register_forward_hook(lambda module, args, output: seen.update(fused=output))
        with_hook = model["attn"].out_proj.register_forward_pre_hook(lambda module, args: seen.update(context=args[0]))
        found, _ = model["attn"](x, x, x)
        with_hook.remove()
    rows = tokens(batch_first=True)
    torch.testing.assert_close(seen["fused"], rows @ closed.in_proj_weight.T + closed.in_proj_bias, **ROUNDING)
    made = closed.out_proj(seen["context"])
    torch.testing.assert_close(made if batch_first else made.transpose(0, 1), found, **ROUNDING)


def test_the_original_is_back_whatever_happens() -> None:
    shared, own_keys = attention(), attention(kdim=WIDTH + 1)
    model = nn.ModuleDict({"attn": shared, "inside": nn.ModuleList([attention(add_bias_kv=True), own_keys])})
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ZeroDivisionError), open_attention(model):
        swapped = [isinstance(m, OpenAttention) for m in (model["attn"], *model["inside"])]
        assert swapped == [True, False, False]  # extra keys, or weights apart: not one layer for q, k and v
        assert {id(p) for p in model.parameters()} >= {id(p) for p in shared.parameters()}
        _ = 1 / 0
    assert model["attn"] is shared and model["inside"][1] is own_keys
    assert [name for name, _ in model.named_parameters()] == names
