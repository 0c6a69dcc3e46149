"""Head pairing on contexts whose answer is known: heads permuted, turned, rescaled, copied, dropped, silent."""

import pytest
import torch
from helpers.no_waiting import NoHost
from theseus_transport.activations.moments import CrossMoment
from theseus_transport.linalg import polar
from theseus_transport.recipes import head_pairing
from theseus_transport.recipes.head_pairing import HeadPairing, nuclear, pair_heads, similarity

TOKENS, SIZE = 60, 5


def contexts(heads: int, seed: int = 0) -> torch.Tensor:
    """[tokens, heads, head size], every head of its own."""
    return torch.randn(TOKENS, heads, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def disguised(source: torch.Tensor, order: list[int], size: int = SIZE) -> torch.Tensor:
    """The heads ``order``, each turned into ``size`` >= SIZE dimensions and rescaled: of similarity 1 to their own."""
    generator = torch.Generator().manual_seed(7)
    turns = torch.linalg.qr(torch.randn(len(order), size, SIZE, dtype=torch.float64, generator=generator))[0].mT
    scales = torch.linspace(0.2, 5, len(order), dtype=torch.float64)
    return torch.einsum("nhs,hst->nht", source[:, order], turns * scales[:, None, None])


def moment(source: torch.Tensor, target: torch.Tensor) -> CrossMoment:
    found = CrossMoment.zeros(source[0].numel(), target[0].numel())
    found.update(source.flatten(1), target.flatten(1))
    return found


def pair(source: torch.Tensor, target: torch.Tensor, *kv: int) -> HeadPairing:
    return pair_heads(moment(source, target), (source.shape[1], target.shape[1]), kv)


@pytest.mark.parametrize(
    "order, kv, groups",
    [
        ([0, 1, 2, 3, 4, 5], 3, [0, 1, 2]),
        ([4, 2, 0, 5, 1, 3], 6, [4, 2, 0, 5, 1, 3]),  # plain heads
        ([5, 4, 0, 1, 3, 2], 3, [2, 0, 1]),  # groups permuted, and heads inside them
        ([3, 5, 4, 1, 0, 2], 2, [1, 0]),
        ([2, 0, 1, 5, 3, 4], 1, [0]),  # one kv head for all
    ],
)
@pytest.mark.parametrize("size", [SIZE, SIZE + 3])
def test_permuted(order: list[int], kv: int, groups: list[int], size: int) -> None:
    source = contexts(6)
    found = pair(source, disguised(source, order, size), kv, kv)
    assert found.query.tolist() == order and found.kv.tolist() == groups and found.lost == []
    torch.testing.assert_close(found.similarity, torch.ones(6).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "order, kv, groups",
    [
        ([0, 1, 2, 3, 2, 3], (2, 3), [0, 1, 1]),  # a group copied
        ([2, 3, 0, 1, 2, 3, 0, 1], (2, 4), [1, 0, 1, 0]),  # all groups copied
        ([1, 0, 1, 3, 3, 2], (2, 2), [0, 1]),  # one query head copied inside each group
        ([0, 1, 2, 3], (2, 4), [0, 0, 1, 1]),  # grouped attention written as plain heads
        ([3, 1, 0, 2, 1, 3], (4, 6), [3, 1, 0, 2, 1, 3]),
    ],
)
def test_copies(order: list[int], kv: tuple[int, int], groups: list[int]) -> None:
    source = contexts(4)
    found = pair(source, disguised(source, order), *kv)
    assert found.query.tolist() == order and found.kv.tolist() == groups and found.lost == []


@pytest.mark.parametrize(
    "order, kv, lost",
    [
        ([4, 1], (6, 2), [0, 2, 3, 5]),
        ([3, 2, 5, 4], (3, 2), [0, 1]),  # a whole group lost
        ([2, 0, 3, 5], (2, 2), [1, 4]),  # one head of each group lost
    ],
)
def test_heads_that_feed_nothing_are_lost(order: list[int], kv: tuple[int, int], lost: list[int]) -> None:
    source = contexts(6)
    found = pair(source, disguised(source, order), *kv)
    assert found.query.tolist() == order and found.lost == lost


def test_a_group_is_paired_as_a_whole() -> None:
    """Target group 0 holds images of heads 0 and 2: one of each source group, so only one of them finds its own."""
    source = contexts(4)
    found = pair(source, disguised(source, [0, 2, 3, 1]), 2, 2)
    for group in range(2):
        heads = found.query[2 * group : 2 * group + 2]
        assert torch.equal(heads // 2, found.kv[group].expand(2)) and heads[0] != heads[1]
    assert found.lost == []


def test_silent_heads_are_similar_to_nothing() -> None:
    source = contexts(4)
    source[:, 1] = 0
    target = disguised(source, [3, 1, 0, 2])
    score = similarity(moment(source, target), (4, 4))
    assert score.isfinite().all() and not score[1].any() and not score[:, 1].any()
    found = pair(source, target, 4, 4)
    assert found.query.tolist() == [3, 1, 0, 2] and found.similarity[1] == 0  # silent pairs with silent: what is left
    widened = pair(source, torch.cat([target, target[:, 2:]], 1), 4, 6)
    assert widened.query[[0, 2, 3, 4, 5]].tolist() == [3, 0, 2, 0, 2]
    dead = pair(0 * source, target, 4, 4)
    assert sorted(dead.query.tolist()) == [0, 1, 2, 3] and not dead.similarity.any()


def test_similarity_lies_between_0_and_1() -> None:
    """1 for equality up to rotation and scale, and by Cauchy-Schwarz never above."""
    source = contexts(5)
    unlike = similarity(moment(source, contexts(3, seed=9)), (5, 3))
    assert unlike.shape == (5, 3) and bool(((unlike > 0) & (unlike < 0.7)).all())
    alike = similarity(moment(source, disguised(source, [0, 1, 2, 3, 4])), (5, 5))
    torch.testing.assert_close(alike.diagonal(), torch.ones(5).double(), rtol=0, atol=1e-12)
    assert bool((alike - torch.eye(5).double() < 0.7).all())


def test_pairing_is_the_same_every_time() -> None:
    source = contexts(4)
    tied = source[:, [0, 0, 1, 1]]  # ties are broken, but always alike
    first, again = (pair(tied, tied, 2, 2) for _ in range(2))
    assert torch.equal(first.query, again.query) and first.lost == again.lost


@pytest.mark.parametrize("largest", [4, 128], ids=["products", "rotations"])
def test_a_device_decomposes_heads_where_they_lie(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CPU were one: the scores alone are fetched, and no value is read on the way to those of wide heads."""
    source = contexts(6)
    source[:, 2] = 0  # a silent head
    found = moment(source, disguised(source, [4, 2, 0, 5, 1, 3], SIZE + 3))
    expected, fetched, real = similarity(found, (6, 6)), [], torch.Tensor.cpu
    for place in (head_pairing, polar):
        monkeypatch.setattr(place, "remote", lambda x: True)
    monkeypatch.setattr(head_pairing, "LARGEST_ON_CUDA", largest)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: (fetched.append(x.shape), real(x))[1])
    torch.testing.assert_close(similarity(found, (6, 6)), expected, rtol=0, atol=6 * 1e-6)  # 6 directions at the floor
    assert fetched == [(6, 6)]
    if largest == 4:
        with NoHost():
            nuclear(torch.randn(2, 3, 7, 5, dtype=torch.float64))
