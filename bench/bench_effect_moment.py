"""effect_moment_ beside the same in plain torch: `make bench`, on a GPU `make gpu-check`."""

from itertools import cycle

import baseline
import pytest
import torch
from timing import DEVICE, in_turns, ratio
from torch import Tensor

import theseus_ext
from theseus_ext.checks import CROSSES, EFFECT_MASTERS

# rows, the writer's input, residual of source and target: attention output and MLP contraction
CASES = [(6304, 896, 768, 896), (6304, 3584, 768, 896)]
CASES += [] if DEVICE == "cpu" else [(32768, 4096, 3072, 4096), (32768, 14336, 3072, 4096)]


def masters(given: list[Tensor]) -> dict[str, Tensor]:
    widths = {"input": given[0].shape[1], "source": given[1].shape[1], "target": given[3].shape[1]}
    shapes = {name: (widths["input"], widths[of]) for name, of in CROSSES.items()}
    shapes |= {f"{of}_{what}": (width,) for of, width in widths.items() for what in ("sum", "energy")}
    return {name: torch.zeros(shapes[name], dtype=torch.float64, device=DEVICE) for name in EFFECT_MASTERS}


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_effect_moment(store, case: tuple[int, int, int, int], kind: str) -> None:
    torch.manual_seed(0)
    rows, width, source, target = case
    given = [torch.randn(rows, width, device=DEVICE)]
    for side in (source, target):
        before = torch.randn(rows, side, device=DEVICE)
        given += [before + 0.1 * torch.randn_like(before), before]
    given = [each.to(getattr(torch, kind)) for each in given]
    found, other, exact = (masters(given) for _ in range(3))
    theseus_ext.effect_moment_(*given, **found)
    baseline.effect_moment_(*given, **other)
    theseus_ext.reference.effect_moment_(*given, **exact)
    for name in EFFECT_MASTERS:
        allowed = 2 * (other[name] - exact[name]).norm() + 1e-13 * exact[name].norm()
        assert (found[name] - exact[name]).norm() <= allowed, name
    error = float((found["source_cross"] - exact["source_cross"]).norm() / exact["source_cross"].norm())
    turns = [cycle([[each.clone() for each in given] for _ in range(2)]) for _ in range(2)]
    seconds = in_turns(
        {
            "ours": lambda: theseus_ext.effect_moment_(*next(turns[0]), **found),
            "torch": lambda: baseline.effect_moment_(*next(turns[1]), **other),
        },
        rounds=5,
    )
    best = {name: min(each) for name, each in seconds.items()}
    row = {"case": f"{rows} x {width} to {source}, {target}, {kind}"}
    row |= {f"{name} ms": 1e3 * value for name, value in best.items()}
    row |= {"GFLOP/s": 2e-9 * rows * width * (width + source + target) / best["ours"]}
    row |= {"error": error}
    row |= {"over torch": ratio(seconds["ours"], seconds["torch"])}
    store("effect_moment", row)
