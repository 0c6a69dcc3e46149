"""What fits to the effect hold, in bytes: both models as changed, sums of what a writer reads, and solving for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..linalg.ridge import SKETCHED
from ..models.geometry import Role
from ..updates.alpha import TRIED
from .terms import ROWS_AHEAD, Terms


@dataclass(frozen=True)
class FitTerms:
    """What the stage holds that follows a block's maps, where both models run as changed; properties are in bytes."""

    terms: Terms

    @property
    def host(self) -> int:
        """Hidden states, and on the CPU all else; for a GPU the target's block as updated, before it goes there."""
        t = self.terms
        if t.gpu:
            block = t.sizes.updated_made + 2 * self._moved if self._phases else 0
            return max((hidden for hidden, _ in self._phases), default=0) + block + self._tried
        return max((hidden + held for hidden, held in self._phases), default=0) + self._tried

    @property
    def device(self) -> int:
        """What of it lies where it is computed."""
        return max((held for _, held in self._phases), default=0)

    @property
    def made(self) -> int:
        """Fits of a block that are not yet written, in float64."""
        ranks = self.terms.sizes.writers
        return sum(8 * ((ranks[role] or 0) * (out + inputs) or out * inputs) for role, (out, inputs) in self._writers)

    @property
    def _tried(self) -> int:
        """Hidden states of the rows that are held out, at every strength that is tried."""
        return self._batch(0, len(TRIED))

    @property
    def _writers(self) -> list[tuple[Role, tuple[int, int]]]:
        """Role and shape [out, in] of the layers that are fitted, in the order in which they are."""
        weights = self.terms.sizes.geometries.target.weights()
        return [(role, shape) for role, shape in weights.items() if role in self.terms.sizes.writers]

    @property
    def _moved(self) -> int:
        """What the prior moves of a target's weight, in float64."""
        return 8 * max((a * b for _, (a, b) in self.terms.sizes.matrices), default=0)

    @property
    def _phases(self) -> list[tuple[int, int]]:
        """(hidden states, all else) of every step; what lies between attention and MLP goes behind attention's fit."""
        if not (self._writers or self.terms.sizes.told):
            return []
        t, sizes = self.terms, self.terms.sizes
        updated = sizes.running.target if t.gpu else sizes.updated_made
        prior = 2 * self._moved + (0 if sizes.recipe.solver.alone else t.move)
        tuned = sizes.running.source if t.gpu else sizes.tuned_made
        found = [(self._states(4, 3), tuned + t.inside + self._watched)]
        for role, (out, inputs) in self._writers:
            hidden = self._states(4, 3) if role == "output" else self._states(2, 2)
            beside = self.made + (0 if t.gpu else updated)  # on a GPU the block is gone when its writer is solved for
            filled = updated + self.made + max(prior, self._summing(inputs) + t.inside + self._watched)
            found.append((hidden, max(filled, beside + self._solving(out, inputs, sizes.writers[role]))))
        last = updated + self.made + max(prior, t.inside + self._watched + self._told)
        return [*found, (self._states(2, 2), last)]

    def _states(self, source: int, target: int) -> int:
        """So many hidden states of each side; where nothing is fitted, of more than one of the rows held out alone."""
        if self._writers:
            return self.terms.states(source, target)
        return self.terms.states(1, 1) + self._batch(source - 1, target - 1)

    @property
    def _watched(self) -> int:
        """What is watched of a batch: the inputs of a writer, and residuals around it."""
        return self._batch(2, 2) + self.terms.inside // 2

    @property
    def _told(self) -> int:
        """Of the rows that are held out effect and change in float64, and the target's block at another strength."""
        n, m = self.terms.sizes.elementwise
        return 8 // n * self._batch(2, 0) + 8 // m * self._batch(0, 4) + self.terms.sizes.running.target

    def _batch(self, source: int, target: int) -> int:
        """So many hidden states of a batch of each side."""
        one = replace(self.terms, choice=replace(self.terms.choice, resident=False))
        return one.states(source, target)

    @property
    def _parts(self) -> int:
        """How many sums there are: where lambda is chosen, of the rows that are fitted and of those that judge."""
        return 1 if self.terms.sizes.recipe.ridge else 2

    def _sums(self, inputs: int) -> int:
        """Of a writer's inputs with themselves, with the effect, and with what is there of it."""
        own, other = (geometry.width for geometry in self.terms.sizes.geometries)
        return 8 * inputs * (inputs + own + other)

    def _summing(self, inputs: int) -> int:
        """Sums, a chunk's product, and its rows as they pair, in the dtype of tokens."""
        sizes = self.terms.sizes
        (own, other), size = (geometry.width for geometry in sizes.geometries), max(sizes.elementwise)
        rows = min(ROWS_AHEAD, self.terms.choice.batch_size * max(sizes.extent.lengths))
        read = max(inputs, own, other) * inputs + rows * (inputs + own + other)
        return self._parts * self._sums(inputs) + size * read

    def _solving(self, out: int, inputs: int, rank: int | None) -> int:
        """Of a weight [out, in]: the Gram and its Cholesky factor, and matrices of its own size; see `linalg/ridge.py`.

        The factor is made twice where the fit is cut to a rank. What is missing is formed of the sums before. Where
        lambda is chosen there are two Grams and a factor, with fits of a few combinations of outputs, or the two added.
        """
        square, weight, parts = 8 * inputs**2, 8 * out * inputs, self._parts
        missing = parts * self._sums(inputs) + (3 + parts) * weight
        choosing = 3 * square + max(3 * weight, 2 * weight + 6 * 8 * inputs * min(out, SKETCHED)) if parts > 1 else 0
        return max(missing, choosing, 2 * square + (4 if rank is None else 6) * weight)
