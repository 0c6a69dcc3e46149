"""How much of a tune arrived, said without labels: by what source and target predict on rows that are held out.

Where both models' heads share their classes or tokens, the logits that are wanted of the moved target are the target's
plus what the tune changed of the source's. The share of divergence that is removed, 1 - KL(wanted | T+) / KL(wanted |
T), is 1 where the moved target predicts just that, 0 where it is as far away as without any update, below where it is
further.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations.pairing_tokens import Mixings
from ..activations.row_mixing import RowMixing
from ..models.base import Base
from ..models.pair import Pair
from ..models.tensors import PIECE, shape_of
from ..updates.computed import ComputedUpdate
from .changed_weights import VOCABULARY, TunedWeights
from .loop import Side
from .skeleton import Weights

ROWS = 512  # of a vocabulary's logits, evenly spread over the batch


@dataclass(frozen=True)
class Head:
    """A head that both models have, over the same outputs: its purpose, and how many outputs they share."""

    purpose: str
    outputs: int

    def tiles(self, *predictions: Prediction) -> tuple[slice, ...]:
        """Of outputs, so few that weights and logits of each of these heads are small."""
        step = max(1, PIECE // max(max(each.read.shape) for each in predictions))
        return tuple(slice(first, min(first + step, self.outputs)) for first in range(0, self.outputs, step))


def shared_head(bases: Pair[Base], rows: Mixings, *, one_tokenizer: bool) -> Head | None:
    """The head whose outputs mean the same on both sides, if there is one.

    Args:
        rows: which tokens pair: where one side's are mixed of several, the two have other tokenizers.
    """
    for purpose in ("classes", "vocabulary"):
        found = [stored_head(base, purpose) for base in bases]
        if not all(found):
            continue
        outputs = [shape_of(base.tensors, str(name))[0] for base, name in zip(bases, found, strict=True)]
        if purpose == "classes":
            families = bases.map(lambda base: base.geometry.family)
            if outputs[0] == outputs[1] > 1 and families.source.classes_read == families.target.classes_read:
                return Head(purpose, outputs[0])
        elif (outputs[0] == outputs[1] or one_tokenizer) and (rows.source is None or rows.source.weight is None):
            return Head(purpose, min(outputs))
    return None


def stored_head(base: Base, purpose: str) -> str | None:
    """The stored weight of a head; a tied one's is the embedding's."""
    family, slots = base.geometry.family, base.slots
    name = f"{family.heads.get(purpose)}.weight"
    if name in slots:
        return slots[name].stored
    token = family.embedding("token")
    tied = purpose == "vocabulary" and base.geometry.tied and token is not None and token.name in slots
    return slots[token.name].stored if tied and token else None


def comes_apart(update: ComputedUpdate) -> bool:
    """Whether the target's head, tied to its embedding, is not that under a moved adapter, which holds one of both."""
    base, token = update.target, update.family.embedding("token")
    if not base.geometry.tied or update.delta.adapter is None or update.dense or update.shared:
        return False
    return bool(update.carried_apart) or (token is not None and token.name in update.into)


@dataclass(frozen=True)
class Prediction:
    """What a model predicts of some rows, tile by tile of its head: never all logits of a vocabulary at once.

    Attributes:
        read: what its head reads, [rows, width]; weights: of the head.
        stored, bias: names of the head's tensors; bias may be none.
    """

    read: Tensor
    weights: Weights
    stored: str
    bias: str | None

    def logits(self, outputs: slice) -> Tensor:
        """[rows, outputs] in float64."""
        found: Tensor = (self.read @ self.weights.rows(self.stored, outputs).to(self.read).T).double()
        return found if self.bias is None else found + self.weights[self.bias][outputs].to(found)


def prediction(
    side: Side, base: Base, head: Head, state: Tensor, weights: Weights, rows: RowMixing | None, mask: Tensor | None
) -> Prediction:
    """What a model with these ``weights`` predicts from hidden states behind its last block.

    Args:
        state: [samples, tokens, width].
        rows: of the tokens that a vocabulary's head is compared on; mask: which tokens are none of padding, if known.
    """
    family = base.geometry.family
    norm = side.skeleton.norm(family.final_norm)
    names = {part: f"{family.final_norm}.{part}" for part, _ in norm.named_parameters()}
    own = {part: weights[base.slots[name].stored].to(state) for part, name in names.items() if name in base.slots}
    z: Tensor = torch.func.functional_call(norm, own, (state,))
    stored, bias = stored_head(base, head.purpose), base.slots.get(f"{family.heads[head.purpose]}.bias")
    if head.purpose == "vocabulary" and isinstance(weights, TunedWeights):
        stored = VOCABULARY
    assert stored is not None
    return Prediction(_read(base, head, z, rows, mask), weights, stored, bias.stored if bias else None)


def _read(base: Base, head: Head, z: Tensor, rows: RowMixing | None, mask: Tensor | None) -> Tensor:
    """The rows [rows, width] that a head reads of the final norm's output; see :func:`logits`."""
    if head.purpose == "vocabulary":
        flat = z.flatten(0, 1)
        flat = flat if rows is None else rows.to(z.device)(flat)
        return flat[:: -(-len(flat) // ROWS)]
    geometry = base.geometry
    if geometry.family.modality == "text":  # the last token that is none of padding
        last = torch.full((len(z),), z.shape[1] - 1) if mask is None else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return z[torch.arange(len(z)), last.to(z.device)]
    if geometry.one_token:
        return z[:, 0]
    patches = z[:, sum(geometry.ahead) :].mean(1)
    return torch.cat([z[:, 0], patches], 1) if geometry.family.classes_read == 2 else patches


def removed(
    head: Head, target: Prediction, source: Pair[Prediction], updated: Mapping[float, Prediction]
) -> dict[float, float]:
    """By strength the share of divergence from what is wanted that is removed; none where there was none.

    Args:
        target: of the target's base; source: of the source's base and of its tune; updated: of the target, by strength.
    """
    found = {0.0: target, **updated}
    wanted, gaps = Logarithm(), {alpha: torch.zeros(()) for alpha in found}
    others = {alpha: Logarithm() for alpha in found}
    for outputs in head.tiles(target):
        before = target.logits(outputs)
        w = before + source.target.logits(outputs) - source.source.logits(outputs)
        faded, p = wanted.add(w)
        for alpha, each in found.items():
            own = each.logits(outputs) if alpha else before
            others[alpha].add(own)
            gaps[alpha] = gaps[alpha] * faded + (p * (w - own)).sum(1)
    total = wanted.total
    kl = {a: float((gap / wanted.sum - total + others[a].total).mean().clamp(min=0)) for a, gap in gaps.items()}
    start = kl.pop(0.0)
    return {alpha: 1 - left / start for alpha, left in kl.items()} if start > 0 else {}


class Logarithm:
    """The logarithm of a sum of exponentials [rows] that arrive tile by tile.

    Attributes:
        most: the largest exponent so far; sum: of the exponentials, in units of that one's.
    """

    def __init__(self) -> None:
        self.most, self.sum = torch.tensor(-torch.inf), torch.zeros(())

    def add(self, exponents: Tensor) -> tuple[Tensor, Tensor]:
        """Take exponents [rows, outputs]; returns what earlier sums are to be multiplied by, and their exponentials."""
        most = torch.maximum(self.most.to(exponents), exponents.amax(1))
        faded, new = (self.most.to(most) - most).exp(), (exponents - most[:, None]).exp()
        self.sum = self.sum.to(most) * faded + new.sum(1)
        self.most = most
        return faded, new

    @property
    def total(self) -> Tensor:
        """Their logarithm, [rows]."""
        return self.most + self.sum.log()
