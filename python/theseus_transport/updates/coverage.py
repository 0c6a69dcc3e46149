"""Which changed tensors of the source stay behind, and the reason that the coverage tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..alignment.alignment import Alignment
from ..errors import InputRefused

TIES = "the target ties its head to the embedding"
BY_EFFECT = "by its effect on what the residual's writers add"
ADDED = "added: the source's update has no such layer"
NO_FACTORS = "no factors hold it; --output checkpoint does"
GUESSED = ", as guessed"  # ends the reason why a block stays where the pairing of blocks is not known yet


@dataclass(frozen=True)
class Stays:
    """The reasons of one transport; names are canonical names of the source.

    Attributes:
        patterns: globs of what the user asked to leave.
    """

    alignment: Alignment
    patterns: Sequence[str]

    def __post_init__(self) -> None:
        listed = isinstance(self.patterns, Sequence) and not isinstance(self.patterns, str)
        if not listed or not all(isinstance(pattern, str) for pattern in self.patterns):
            given = [self.patterns] if isinstance(self.patterns, str) else ["lm_head*"]
            raise InputRefused(f"leave is {self.patterns!r}; give a list of glob patterns, as leave={given}")

    def asked(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def of_head(self, name: str) -> bool:
        return name.split(".")[0] in self.alignment.source.family.heads.values()

    def by_rule(self, name: str) -> str | None:
        """Why a tensor stays whatever the two bases hold: the recipe, the pairing of blocks, or the family says so."""
        recipe, source = self.alignment.recipe, self.alignment.source
        if self.is_embedding(name) and not recipe.moves_embeddings:
            return f"the {recipe.name} recipe leaves embeddings"
        if self.of_head(name) and recipe.head == "leave":
            return "the recipe leaves heads"
        block = source.family.block_of(name)
        last = max(own for own in self.alignment.blocks if own is not None)
        if block in range(source.depth) and block not in self.alignment.blocks:
            if recipe.fits and block is not None and block < last:
                return None
            guessed = GUESSED if self.alignment.draft else ""
            return f"no block of the target takes block {block}{guessed}"
        return source.family.why_left(name)

    def unmoved(self, name: str, *, is_new: bool) -> str | None:
        """Why a changed tensor that nothing took up may stay, or None: then it is an error.

        Args:
            is_new: whether the source's base does not have it.
        """
        f, layer = self.alignment.source.family, name.rpartition(".")[0]
        vectors = {rule.source.rpartition(".")[0] for rule in self.alignment.vectors.values()}
        if layer in {*self.alignment.source.norms(), *vectors} and not self.is_embedding(name):
            return "no layer that reads it moves"
        if self.is_embedding(name) or self.of_head(name):
            return f"the {'source base' if is_new else 'target'} has no such tensor"
        inside = tuple(part for part in (f.query_norm, f.key_norm) if part)
        behind = tuple(part for part in (f.output_scale, f.contract_scale) if part)
        if layer.endswith(inside) or name.endswith(behind):
            return f"the {self.alignment.recipe.name} recipe has no rule for it"
        return None

    def is_embedding(self, name: str) -> bool:
        return any(e.name == name for e in self.alignment.source.family.embeddings)
