"""Which block feeds which, and which spaces are then compared: by hand, and against trying every pairing."""

from itertools import combinations

import pytest
import torch
from exact.models import LLAMA, VIT, base
from theseus_transport.activations.links import Pairs
from theseus_transport.alignment.block_pairing import increasing, similarities
from theseus_transport.models.geometry import Geometry
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows, columns", [(1, 1), (2, 4), (4, 2), (4, 4), (3, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_the_pairing_is_the_best_of_all(rows: int, columns: int, seed: int) -> None:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = increasing(scores)
    pairs = [(i, j) for j, i in enumerate(found) if i is not None]
    assert [i for i, _ in pairs] == sorted({i for i, _ in pairs})
    every = (
        sum(float(scores[i, j]) for i, j in zip(own, into, strict=True))
        for count in range(1, min(rows, columns) + 1)
        for own in combinations(range(rows), count)
        for into in combinations(range(columns), count)
    )
    assert sum(float(scores[pair]) for pair in pairs) == pytest.approx(max(every), rel=1e-12)


def test_blocks_alike_pair_up_and_blocks_without_effect_do_not() -> None:
    assert increasing(torch.tensor([[0.1, 0.9, 0.2, 0.0], [0.3, 0.2, 0.1, 0.8]])) == [None, 0, None, 1]
    assert increasing(torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.7]])) == [0, 2]
    assert increasing(torch.zeros(2, 3)) == [None] * 3


@pytest.mark.parametrize("tokens", [4, 50])
def test_likeness_ignores_turns_and_sizes(tokens: int) -> None:
    """Both ways of making a block's update small enough: by tokens, or by features."""
    updates = [normal(tokens, 6, seed=seed) for seed in (1, 2)]
    turn = torch.linalg.qr(normal(9, 6, seed=3)).Q.T
    found = similarities(updates, [*(3 * u @ turn for u in updates), torch.zeros(tokens, 9)])
    assert found.diagonal().tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert found[:, 2].tolist() == [0.0, 0.0] and 0 < found[0, 1] < 0.99 and 0 < found[1, 0] < 0.99
    direct = torch.linalg.matrix_norm(updates[0].T @ updates[1] @ turn, "nuc") / (updates[0].norm() * updates[1].norm())
    assert float(found[0, 1]) == pytest.approx(float(direct), rel=1e-12)


def links(source: int, target: int, blocks: list[int | None]) -> dict[str, tuple[str, str]]:
    geometries = [Geometry.of(base(LLAMA, num_hidden_layers=depth).build()) for depth in (source, target)]
    found = Pairs(*geometries, blocks).moments
    assert all(link.source.width and link.target.width for link in found.values())
    return {name: (link.source.module, link.target.module) for name, link in found.items()}


def test_blocks_of_the_same_number() -> None:
    found = links(2, 2, [0, 1])
    assert list(found) == [f"{b}.{part}" for b in (0, 1) for part in ("attention", "context", "mlp", "middle")] + [
        "final"
    ]
    assert all(own == into for own, into in found.values())


def test_what_follows_a_block_is_compared_with_what_follows_its_source() -> None:
    """Source blocks 0 and 2 feed target blocks 1 and 2 of 4; nothing behind a pair is a pair's own first norm."""
    found = links(3, 4, [None, 0, 2, None])
    norm = "layers.{}.input_layernorm".format
    assert found["embedding"] == (norm(0), norm(0))
    assert found["1.attention"] == (norm(0), norm(1)) and found["1.after"] == (norm(1), norm(2))
    assert found["2.attention"] == (norm(2), norm(2)) and found["2.after"] == ("norm", norm(3))
    assert found["2.middle"] == ("layers.2.mlp.down_proj",) * 2
    assert found["1.context"] == ("layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj")
    assert found["final"] == ("norm", "norm") and not any(name.startswith(("0.", "3.")) for name in found)


def test_neighbours_share_the_space_between_them() -> None:
    found = links(3, 3, [None, 0, 1])
    assert "1.after" not in found and found["2.after"] == ("layers.2.input_layernorm", "norm")
    assert "0.after" not in links(2, 3, [0, 1, None]) and "1.after" in links(2, 3, [0, 1, None])


def test_images_begin_at_the_first_norm() -> None:
    geometries = [Geometry.of(base(VIT, num_hidden_layers=depth).build()) for depth in (1, 2)]
    found = Pairs(*geometries, [None, 0]).moments
    assert found["embedding"].source.module == "layers.0.layernorm_before"
