"""Symmetries: moves that change every parameter of a model and not its function.

A move is `(spec, seed) -> spec`. All its draws follow from the seed, so the same move of a base and of its tuned model
is the same re-parametrisation, and the moved tuned model is what an exact transport must compute.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .models import Move, Spec, tune
from .move_around import deeper, scales_folded, stored_as, untied, with_registers, without_bias, zoomed
from .move_heads import (
    all_groups_copied,
    beside_live,
    dense,
    heads,
    heads_permuted,
    kv_unshared,
    larger_rotary_heads,
    one_group_copied,
    one_query_copied,
    planar,
    two_groups_copied,
)
from .move_neurons import doubled_neurons, neurons, permuted_neurons, with_extra
from .move_residual import doubled, residual, rotated, same, signed_permutation, widened

__all__ = [
    "Move", "Pair", "all_groups_copied", "beside_live", "deeper", "dense", "doubled", "doubled_neurons", "heads",
    "heads_permuted", "kv_unshared", "larger_rotary_heads", "neurons", "one_group_copied", "one_query_copied",
    "permuted_neurons", "planar", "residual", "rotated", "same", "scales_folded", "signed_permutation", "stored_as",
    "two_groups_copied", "untied", "widened", "with_extra", "with_registers", "without_bias", "zoomed",
]  # fmt: skip


@dataclass(frozen=True)
class Pair:
    name: str
    base: Callable[[], Spec]
    moves: tuple[Move, ...]
    deltas: tuple[str, ...] = ("linear", "gains", "everything", "lora")
    calibration: tuple[tuple[str, object], ...] = ()  # arguments of `batches`
    keep: str = "nothing"  # the end of names no delta moves
    narrow: bool = False  # the moved model is the source: its delta lies inside the image of the smaller target

    def sides(self, kind: str) -> tuple[Spec, Spec, Spec, Spec]:
        """Source base, source tuned, target base, and the tuned target an exact transport must reach."""
        small, source, target, moves = bases(self)
        tuned = tune(small, kind, keep=self.keep)
        return source, move(tuned, moves[0]), target, move(tuned, moves[1])


@lru_cache(maxsize=4)  # they do not depend on the delta
def bases(pair: Pair) -> tuple[Spec, Spec, Spec, tuple[Sequence[Move], Sequence[Move]]]:
    """What both sides are moved from, source and target base, and the moves of each."""
    small = pair.base()
    own = (residual(same, carry_final="head.weight" not in small.parts),)  # the small side gets gains of its own
    moves = (pair.moves, own) if pair.narrow else ((), pair.moves)
    return small, move(small, moves[0]), move(small, moves[1]), moves


def move(spec: Spec, moves: Sequence[Move]) -> Spec:
    for seed, step in enumerate(moves):
        spec = step(spec, 100 + seed)
    return spec
