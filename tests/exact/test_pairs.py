"""The pairs themselves: target base and tuned target compute what the source computes, whatever transport does."""

import pytest
import torch

from . import pairs_llama, pairs_text, pairs_vision, pairs_vit
from .models import batches, relative_error

TABLES = {"llama": pairs_llama.EXACT, "vit": pairs_vit.EXACT, **pairs_text.TEXT, **pairs_vision.VISION}
CASES = [
    pytest.param(pair, kind, id=f"{family}-{pair.name}-{kind}")
    for family, table in TABLES.items()
    for pair in table
    for kind in [kind for kind in pair.deltas if kind != "lora"][-1:]  # the widest change
]


@pytest.mark.parametrize("pair, kind", CASES)
def test_target_computes_the_source(pair, kind):
    source, tuned, target, moved = pair.sides(kind)
    data = batches(source, seed=5, count=1)
    reads = (source, source), (source, tuned), (target, target), (target, moved)  # tuned models read as their bases
    outputs = [base.outputs(spec.build(), data) for base, spec in reads]
    change = (outputs[1] - outputs[0]).norm()
    assert change > 0.02 * outputs[0].norm(), f"the delta moves the outputs by {change:.2g} only"
    assert (outputs[2] - outputs[0]).norm() <= 1e-12 * outputs[0].norm()
    assert relative_error(outputs[3], outputs[1], outputs[0]) <= 1e-11


@pytest.mark.parametrize("pair, kind", CASES)
def test_nothing_is_left_at_its_default(pair, kind):
    """A zero bias or a gain of one hides a rule that forgot it; a verbatim target hides nearly all of them."""
    source, _, target, _ = pair.sides(kind)
    if pair.narrow:
        source, target = target, source  # the moved side of a narrow pair is its source
    for spec, part in ((source, ""), (target, "norm")):  # heads and neurons added by a move may be zero by design
        for name, value in spec.parts.items():
            if value.dim() == 1 and part in name and not name.endswith(pair.keep):
                assert value.abs().min() > 0 and value.std() > 0, name
    verbatim = [n for n, v in source.parts.items() if n in target.parts and torch.equal(target.parts[n], v)]
    assert len(verbatim) < len(source.parts), "the target is a verbatim copy"
