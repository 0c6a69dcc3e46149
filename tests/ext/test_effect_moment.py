"""theseus_ext.effect_moment_: values against float64, bounds tied to plain torch, mixings, contract, errors."""

import re
import sys
from pathlib import Path

import pytest
import torch

import theseus_ext
from theseus_ext.checks import CROSSES, EFFECT_MASTERS

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import baseline  # noqa: E402

STATES = ("source_after", "source_before", "target_after", "target_before")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDTHS = {"input": 37, "source": 24, "target": 40}


def masters(widths=WIDTHS, device="cpu"):
    shapes = {name: (widths["input"], widths[of]) for name, of in CROSSES.items()}
    shapes |= {f"{of}_{what}": (widths[of],) for of in widths for what in ("sum", "energy")}
    return {name: torch.zeros(shapes[name], dtype=torch.float64, device=device) for name in EFFECT_MASTERS}


def tokens(rows, others=None, dtype=torch.float32, device="cpu", widths=WIDTHS, move=0.01):
    """Inputs and states; after is before, moved a little, as a tune moves it."""
    made = [torch.randn(rows, widths["input"], dtype=torch.float64) + 0.3]
    for side, count in (("source", others or rows), ("target", rows)):
        before = torch.randn(count, widths[side], dtype=torch.float64) + 0.3
        made += [before + move * torch.randn_like(before), before]
    return [each.to(device, dtype) for each in made]


def added(function, given, **mixings):
    outputs = masters({n: given[i].shape[1] for n, i in (("input", 0), ("source", 1), ("target", 3))}, given[0].device)
    assert function(*given, **outputs, **mixings) is None
    return outputs


def check(given, **mixings):
    """At most twice the error of plain torch, which forms differences in float32; float64 rounding is the floor."""
    ours, torchs, exact = (
        added(function, given, **mixings)
        for function in (theseus_ext.effect_moment_, baseline.effect_moment_, theseus_ext.reference.effect_moment_)
    )
    for name in EFFECT_MASTERS:
        size = exact[name].norm().clamp_min(1e-300)
        error, other = ((each[name] - exact[name]).norm() / size for each in (ours, torchs))
        assert error <= 2 * other + 1e-13, name


def mixing(rows, count, device, kind):
    if kind == "selection":
        return None, torch.randperm(count)[:rows].to(device), None
    entries = torch.arange(rows + 1) * 2
    weight = torch.rand(2 * rows, dtype=torch.float64)
    return entries.to(device), torch.randint(0, count, (2 * rows,)).to(device), weight.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 300, 4100])
def test_values(device, dtype, rows):
    check(tokens(rows, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["selection", "weights"])
@pytest.mark.parametrize("side", ["source", "target", "both"])
def test_mixings(device, dtype, kind, side):
    rows, count = 200, 350
    sides = ("source", "target") if side == "both" else (side,)
    given = tokens(count if "target" in sides else rows, count if "source" in sides else rows, dtype, device)
    check(given, **{f"{s}_mixing": mixing(rows, count, device, kind) for s in sides})


def test_unequal_dtypes_and_strides(device):
    x, s1, s0, t1, t0 = tokens(50, device=device)
    check([x.bfloat16(), s1.double(), s0.double(), t1, t0])
    check([x.T.contiguous().T, s1[:, :7], s0[:, :7].contiguous(), torch.cat([t1, t1])[::2], torch.cat([t0, t0])[::2]])


def test_a_difference_is_formed_before_it_is_multiplied(device):
    """States a thousand times as large as what moved: of products taken first only rounding would be left."""
    given = tokens(500, device=device, move=1e-5)
    for state in given[1:]:
        state += 100
    exact = added(theseus_ext.reference.effect_moment_, given)
    for name, found in added(theseus_ext.effect_moment_, given).items():
        # float32 products of float32 differences of float32 states: a few 2^-24
        assert (found - exact[name]).norm() <= 1e-6 * exact[name].norm(), name


def test_batches_add_and_equal_states_add_nothing(device):
    given = tokens(64, device=device)
    outputs, twice = masters(device=device), added(theseus_ext.effect_moment_, [torch.cat([x, x]) for x in given])
    for _ in range(2):
        theseus_ext.effect_moment_(*given, **outputs)
    for name in EFFECT_MASTERS:
        torch.testing.assert_close(outputs[name], twice[name], rtol=1e-5, atol=1e-6)
    still = added(theseus_ext.effect_moment_, [given[0], given[1], given[1], given[3], given[3]])
    assert not any(still[n].any() for n in EFFECT_MASTERS if n.startswith(("source", "target")))
    assert still["gram"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_meta_and_versions(dtype, device):
    given, outputs = tokens(3, dtype=dtype, device=device), masters(device=device)
    torch.library.opcheck(torch.ops.theseus_ext.effect_moment_.default, (*given, *(None,) * 6), outputs)
    assert theseus_ext.effect_moment_(*(x.to("meta") for x in given), **masters(device="meta")) is None
    before = {name: x._version for name, x in outputs.items()}
    given[1].requires_grad_()
    theseus_ext.effect_moment_(*given, **outputs)
    assert all(x._version > before[name] and not x.requires_grad for name, x in outputs.items())


WRONG = {
    "inputs is [3, 37, 1], expected [tokens, width]; flatten leading dimensions": dict(inputs=torch.ones(3, 37, 1)),
    "source_before is torch.int64, expected float64, float32, bfloat16 or float16": dict(
        source_before=torch.ones(3, 24, dtype=torch.int64)
    ),
    "source_after is [3, 24] in torch.float32 but source_before [3, 23] in torch.float32; both are states of the same "
    "tokens": dict(source_before=torch.ones(3, 23)),
    "target_after is [3, 40] in torch.float32 but target_before [3, 40] in torch.float64; both are states of the same "
    "tokens": dict(target_before=torch.ones(3, 40, dtype=torch.float64)),
    "inputs has 3 rows but source has 4; mix one to match the other": dict(
        source_after=torch.ones(4, 24), source_before=torch.ones(4, 24)
    ),
    "inputs has 5 rows but target has 3": dict(
        inputs=torch.ones(5, 37), source_after=torch.ones(5, 24), source_before=torch.ones(5, 24)
    ),
    "gram is [37, 36], expected [37, 37] from inputs and states": dict(gram=torch.zeros(37, 36).double()),
    "source_cross is [24, 37], expected [37, 24]": dict(source_cross=torch.zeros(24, 37).double()),
    "target_energy is [41], expected [40]": dict(target_energy=torch.zeros(41).double()),
    "gram is torch.float32, expected torch.float64": dict(gram=torch.zeros(37, 37)),
    "source_before is on meta but inputs is on cpu": dict(source_before=torch.ones(3, 24, device="meta")),
    "target_sum is on meta but inputs is on cpu": dict(target_sum=torch.zeros(40, device="meta").double()),
    "gram has strides (1, 37)": dict(gram=torch.zeros(37, 37, dtype=torch.float64).T),
    "pass gram.detach()": dict(gram=torch.zeros(37, 37, dtype=torch.float64, requires_grad=True)),
    "source column[0] is 9 but there are 3 tokens": dict(source_mixing=(None, torch.tensor([9, 0, 1]), None)),
    "target has 2 rows": None,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused_and_writes_nothing(message):
    given = dict(zip(("inputs", *STATES), tokens(3), strict=True))
    outputs = masters()
    change = WRONG[message] or dict(target_mixing=(None, torch.tensor([0, 1]), None))
    if WRONG[message] is None:
        message = "inputs has 2 rows but source has 3"
    with pytest.raises((ValueError, TypeError, RuntimeError), match=re.escape(message)):
        theseus_ext.effect_moment_(**(given | outputs | change))
    assert not any(x.any() for name, x in outputs.items() if name not in change)
