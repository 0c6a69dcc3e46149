"""Presumed changes: what of the files is read, and when."""

from collections.abc import Callable

import pytest
import torch
from test_presumed import PAIRS, Disk, aligned, late
from theseus_transport import Delta, InputRefused, Update, transport
from theseus_transport.models import tensors as tensors_module
from theseus_transport.updates.changes import first_change
from theseus_transport.updates.output import planned
from torch import Tensor


def on_disk(pair: str, change: Callable[[dict[str, Tensor]], object], **options: object) -> tuple[Update, Disk, Disk]:
    state = {n: v.clone() for n, v in PAIRS[pair][0].state.items()}
    change(state)
    own, other = Disk(PAIRS[pair][0].state), Disk(state)
    update = transport(late(aligned(pair)), Delta.between(own, other), Disk(PAIRS[pair][1].state), presumed=True)
    return update, own, other


EMBEDDING = "model.embed_tokens.weight"


def test_presuming_reads_nothing() -> None:
    update, own, other = on_disk("llama", lambda state: state[EMBEDDING].add_(1))
    planned(update, "checkpoint"), planned(update, "delta")
    assert own.read == other.read == [] == update.target.tensors.read
    assert {row.fate for row in update.coverage} == {"transported", "folded"} and len(update.presumed) == len(own)


def test_what_has_no_rule_is_compared_at_once() -> None:
    source, target = PAIRS["llama"]
    states = [{**spec.state, "model.rotary_emb.scale": torch.ones(3)} for spec in (source, source)]
    own, other = Disk(states[0]), Disk(states[1])
    update = transport(late(aligned("llama")), Delta.between(own, other), target.state, presumed=True)
    assert own.read == other.read and {name for name, _ in own.read} == {"model.rotary_emb.scale"}
    assert [row.fate for row in update.coverage if row.tensor == "rotary_emb.scale"] == ["unchanged"]
    other.tensors["model.rotary_emb.scale"] = torch.zeros(3)
    with pytest.raises(InputRefused, match=r"rotary_emb\.scale changed but has no rule"):
        transport(late(aligned("llama")), Delta.between(own, other), target.state, presumed=True)


def test_the_first_change_is_found_with_little_reading() -> None:
    last = "model.layers.1.mlp.up_proj.weight"
    update, own, other = on_disk("llama", lambda state: state[last].add_(1))
    assert first_change(update) == last[6:] and update.unchanged
    assert own.read == other.read and len(set(own.read)) == len(own.read)
    assert [rows for name, rows in own.read if name == last] == [0]
    assert EMBEDDING not in dict(own.read)  # the largest come last
    assert first_change(update) == last[6:] and [n for n, _ in own.read].count(last) == 1


def test_tensors_are_compared_up_to_the_first_rows_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row first, then twice as many each time, up to a piece: here 8 rows."""
    monkeypatch.setattr(tensors_module, "PIECE", 8 * 24)
    update, own, other = on_disk("llama", lambda state: state[EMBEDDING][16].add_(1))
    update.compare(["embed_tokens.weight", "lm_head.weight"])
    assert update.unchanged == {"lm_head.weight"} and update.presumed.isdisjoint({"embed_tokens.weight"})
    assert [rows for name, rows in other.read if name == EMBEDDING] == [0, 1, 3, 7, 15] and own.read == other.read
    assert [rows for name, rows in other.read if name == "lm_head.weight"] == [0, 1, 3, *range(7, 60, 8)]
    update.compare(["embed_tokens.weight", "lm_head.weight"])
    assert len(own.read) == 5 + 10


@pytest.mark.parametrize("find", [first_change, Update.settled])
def test_nothing_to_transport_is_found_out(find: Callable) -> None:
    same, _, _ = on_disk("llama", lambda state: None)
    with pytest.raises(InputRefused, match="nothing to transport: no tensor differs from the base; was the right base"):
        find(same)
    source, target = PAIRS["llama"]
    headless = {n: v for n, v in target.state.items() if n != "lm_head.weight"}
    delta = Delta.between(source.state, {**source.state, "lm_head.weight": torch.zeros(60, 24).double()})
    left = transport(late(aligned("llama")), delta, headless, presumed=True)
    with pytest.raises(InputRefused, match=r"every changed tensor was left behind \(the target has no such tensor\)"):
        find(left)


def test_shapes_and_dtypes_are_told_unread() -> None:
    source, target = PAIRS["llama"]
    other = Disk({**source.state, EMBEDDING: torch.ones(60, 25).double()})
    with pytest.raises(InputRefused, match=r"embed_tokens.weight is \[60, 25\] in the tuned model and \[60, 24\]"):
        transport(late(aligned("llama")), Delta.between(Disk(source.state), other), target.state, presumed=True)
    half = Disk({n: v.bfloat16() for n, v in source.state.items()})
    update = transport(late(aligned("llama")), Delta.between(Disk(source.state), half), target.state, presumed=True)
    assert update.warnings == ["the tuned model is bfloat16, the base float64: their rounding moves along"]
    assert other.read == half.read == []


def test_what_a_tensor_needs_and_reads() -> None:
    update, _, _ = on_disk("gpt2", lambda state: None)
    c_attn = "transformer.h.1.attn.c_attn"
    assert update.needs(f"{c_attn}.weight") == update.needs(f"{c_attn}.bias")
    assert len(update.needs(f"{c_attn}.weight")) == 3
    norm = {"h.1.ln_1.weight", "h.1.ln_1.bias"}
    assert norm < update.sources(f"{c_attn}.weight") and len(update.sources(f"{c_attn}.weight")) == 3 * 2 + 2
    assert update.needs("transformer.wte.weight") == {"wte.weight"} == update.sources("transformer.wte.weight")
    assert update.needs("transformer.ln_f.weight") == frozenset() == update.sources("transformer.ln_f.weight")
    update.compare(update.sources(f"{c_attn}.weight"))
    assert f"{c_attn}.weight" not in update and update.needs(f"{c_attn}.weight") == frozenset()
