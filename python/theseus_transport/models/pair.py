"""What there is once of the source and once of the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", covariant=True)
U = TypeVar("U")
P = TypeVar("P", bound="Pair[Any]")


class Pair(tuple[T, T]):  # a NamedTuple can be generic from Python 3.11 on
    """The tuple (source, target), with names: it unpacks, indexes and compares as one."""

    __slots__ = ()

    def __new__(cls: type[P], source: T, target: T) -> P:
        return super().__new__(cls, (source, target))

    def __getnewargs__(self) -> tuple[T, T]:
        return self.source, self.target  # for copies and pickles

    @property
    def source(self) -> T:
        return self[0]

    @property
    def target(self) -> T:
        return self[1]

    def map(self, f: Callable[[T], U]) -> Pair[U]:
        """What ``f`` makes of the source's and then of the target's."""
        return Pair(f(self.source), f(self.target))

    def zip(self, other: tuple[U, U]) -> Pair[tuple[T, U]]:
        """For either side the two things that this pair and ``other`` have there, source first."""
        return Pair((self.source, other[0]), (self.target, other[1]))


SIDES = Pair("source", "target")
