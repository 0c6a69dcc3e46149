"""What moves look up when they compute: rules and maps, of a whole alignment or of a solver that is still at work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..alignment.alignment import Alignment
from ..recipes.maps import Map
from ..recipes.ruleset import Rule, Ruleset


@dataclass
class Available:
    """The rules and maps that are there now; the one thing of an update that changes while it is written.

    Attributes:
        rules, vectors, maps: as of :class:`Alignment`, all of them or those made so far. An outline's rules name the
            source, the scales come later.
    """

    rules: Mapping[str, Rule] = field(default_factory=dict)
    vectors: Mapping[str, Rule] = field(default_factory=dict)
    maps: Mapping[str, Map] = field(default_factory=dict)

    @classmethod
    def of(cls, alignment: Alignment) -> Available:
        """All of an alignment."""
        return cls(alignment.rules, alignment.vectors, alignment.maps)

    @contextmanager
    def showing(self, made: Ruleset, *, provisional: bool = False) -> Iterator[None]:
        """What a solver has made so far; its maps only within, so that it alone decides how long they live.

        Args:
            provisional: a map that will be completed at the end is shown as it is: on the tokens of the calibration
                the two do the same.
        """
        before, self.rules, self.vectors, self.maps = self.maps, made.rules, made.vectors, made.maps
        if provisional:
            started = {f"{name}.completed": made.maps[name] for name in made.maps}
            self.maps = {**started, **made.maps}
        try:
            yield
        finally:
            self.maps = before

    def rule(self, key: str) -> Rule | None:
        """The rule of a layer or vector, if it is there."""
        return self.rules.get(key) or self.vectors.get(key)

    def ready(self, key: str) -> bool:
        """Whether the rule of a layer or vector is there, and both its maps."""
        rule = self.rule(key)
        return rule is not None and rule.input in self.maps and rule.output in self.maps
