"""`--ridge 0`: every fourth sample judges the penalty of each fit, and whether there is one at all."""

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.effect_by_hand import effect_by_hand, ridge
from theseus_transport.linalg.ridge import GRID
from theseus_transport.streaming import writer_fit

IDS = torch.randint(1, tiny_models.VOCABULARY, (11, 24), generator=torch.Generator().manual_seed(5))
LENGTHS = torch.tensor([24, 9, 17, 12, 24, 24, 5, 20, 24, 13, 24])
MASK = (torch.arange(24) < LENGTHS[:, None]).long()
SAMPLE = MASK.nonzero()[:, 0]  # of every row


def batched(ids, mask=None, size=3):
    """Of several samples each; the last has fewer."""
    whole = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    return [{name: value[at : at + size] for name, value in whole.items()} for at in range(0, len(ids), size)]


def models(**tune):
    torch.manual_seed(4)
    source, target = (tiny_models.llama(side).double() for side in ("source", "target"))
    tuned = tiny_models.tuned(source, **tune)
    for (name, moved), base in zip(tuned.named_parameters(), source.parameters(), strict=True):
        if ".layers." not in name:
            moved.data.copy_(base.data)
    return source, tuned, target


def moved(source, tuned, target, data, *, rank=None, **choices):
    alignment = tt.align(source, target, data, recipe=tt.Recipe("effect", **choices))
    return tt.transport(alignment, tt.Delta.between(source, tuned), target, rank=rank)


def by_rows(chosen):
    """What judges by the rows themselves, and tells ``chosen``."""

    def choose(x, missing, bias):
        judge = SAMPLE % 4 == 3
        errors = {None: missing[judge].square().sum()}
        for rho in GRID:
            weight, shift = ridge(x[~judge], missing[~judge], rho, bias=bias)
            errors[rho] = (x[judge] @ weight.T + (shift if bias else 0) - missing[judge]).square().sum()
        chosen.append(min(errors, key=errors.get))
        return chosen[-1]

    return choose


def test_the_penalty_is_the_one_with_the_least_error_on_every_fourth_sample():
    """Through different code, on rows; samples of several lengths, over batches that no four of them fill."""
    sides, data, chosen = models(), batched(IDS, MASK), []
    update = moved(*sides, data, prior="none", ridge=0)
    expected = effect_by_hand(*sides, data, rho=by_rows(chosen))
    assert len(set(chosen)) > 1, chosen  # else any would do
    assert update.keys() == expected.keys()
    for name, value in expected.items():
        assert (update[name] - value).norm() <= 1e-6 * value.norm(), name


def test_where_an_effect_cannot_be_foretold_nothing_is_fitted():
    """Two writings of each token: alike in both models, so that what is read is; the tune drives them apart."""
    source, tuned, target = models(size=0)
    for model in (source, tuned, target):
        table = model.model.embed_tokens.weight.data
        table[1::2] = table[::2]
    apart = 0.05 * torch.randn(len(IDS) * 100, 24, dtype=torch.float64)[:150]
    table = tuned.model.embed_tokens.weight.data
    table[::2] += apart
    table[1::2] -= apart
    ids = 2 * torch.randint(1, 150, (24, 24))
    ids[3::4] = ids[2::4] + 1
    how = {"prior": "none", "embeddings": "leave"}
    assert len(moved(source, tuned, target, batched(ids), ridge=1e-2, **how)) == 4  # all writers
    with pytest.raises(tt.InputRefused, match="no fit helps on samples it has not seen"):
        moved(source, tuned, target, batched(ids), ridge=0, **how)


def test_fewer_than_four_samples_leave_the_default():
    sides, data = models(), batched(IDS[:3])
    chosen, fixed = (moved(*sides, data, prior="none", ridge=rho) for rho in (0, 1e-2))
    assert chosen.keys() == fixed.keys() and len(fixed) == 4
    for name, value in fixed.items():  # the same sums, of rows that are selected
        assert (chosen[name] - value).norm() <= 1e-9 * value.norm(), name


def test_without_a_fit_what_the_prior_moved_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(writer_fit, "chosen_ridge", lambda *sums, bias: None)
    update = moved(*models(), batched(IDS), prior="coherent", ridge=0, rank=2)
    written = {name: value for name, value in update.items() if "o_proj" in name or "down_proj" in name}
    assert len(written) == 4 and all(torch.linalg.matrix_rank(value) == 2 for value in written.values())
    assert not any(update.fits.share.values())
