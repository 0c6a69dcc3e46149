"""How much of a tune arrived, said without labels: by what source and target predict on rows that are held out.

Where both models' heads share their classes or tokens, the logits that are wanted of the moved target are the target's
plus what the tune changed of the source's. The share of divergence that is removed, 1 - KL(wanted | T+) / KL(wanted |
T), is 1 where the moved target predicts just that, 0 where it is as far away as without any update, below where it is
further.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations.pairing_tokens import Mixings
from ..activations.row_mixing import RowMixing
from ..models.base import Base
from ..models.pair import Pair
from ..models.tensors import row_tiles, shape_of
from .loop import Side
from .skeleton import Weights

ROWS = 512  # of a vocabulary's logits, evenly spread over the batch


@dataclass(frozen=True)
class Head:
    """A head that both models have, over the same outputs: its purpose, and how many outputs they share."""

    purpose: str
    outputs: int


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


def logits(
    side: Side, base: Base, head: Head, state: Tensor, weights: Weights, rows: RowMixing | None, mask: Tensor | None
) -> Tensor:
    """What a head makes of hidden states behind the last block, [rows, outputs] in float64.

    Args:
        state: [samples, tokens, width]; weights: of the final norm and the head.
        rows: of the tokens that a vocabulary's head is compared on; mask: which tokens are none of padding, if known.
    """
    family, dtype = base.geometry.family, state.dtype
    norm = side.skeleton.norm(family.final_norm)
    names = {part: f"{family.final_norm}.{part}" for part, _ in norm.named_parameters()}
    own = {part: weights[base.slots[name].stored].to(state) for part, name in names.items() if name in base.slots}
    z: Tensor = torch.func.functional_call(norm, own, (state,))
    read = _read(base, head, z, rows, mask)
    stored = stored_head(base, head.purpose)
    assert stored is not None
    shape, found = (head.outputs, read.shape[1]), []
    for tile in row_tiles(shape) or (slice(0, head.outputs),):
        found.append(read @ weights.rows(stored, tile).to(read.device, dtype).T)
    bias = base.slots.get(f"{family.heads[head.purpose]}.bias")
    total = torch.cat(found, 1).double()
    return total if bias is None else total + weights[bias.stored][: head.outputs].to(total)


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


def removed(wanted: Tensor, before: Tensor, after: Tensor) -> float | None:
    """The share of divergence from what is wanted that is removed; None where there was none.

    Args:
        wanted, before, after: logits [rows, outputs] in float64.
    """
    start = _divergence(wanted, before)
    return 1 - _divergence(wanted, after) / start if start > 0 else None


def _divergence(wanted: Tensor, found: Tensor) -> float:
    """The mean over rows of KL(wanted | found), in nats."""
    p, q = (torch.log_softmax(x, -1) for x in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))
