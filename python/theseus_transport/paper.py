"""The ``paper`` recipe: every layer's own input and output, no scales, as in arXiv 2602.12952."""

from __future__ import annotations

import torch
from torch import Tensor

from . import maps
from .maps import Map
from .moments import CrossMoment, Grams
from .procrustes import Polar, procrustes
from .recipes import Evidence, Plan, Recipe, Rule
from .whitening import whiten


def plan(e: Evidence, recipe: Recipe) -> Plan:
    """Maps and rules from the evidence; no scales."""
    out = Plan()
    for name, moment in e.moments.items():
        cross = comparable(moment, e.grams.get(name), recipe)
        out.add(name, procrustes(cross, null=recipe.null, floor=recipe.floor), moment.count)
    reads = {"output": "context", "expand": "mlp", "contract": "middle"}
    for own, layer in e.pairs():
        if layer.role == "head":
            if recipe.head == "move":
                out.rules[layer.name] = Rule(own.name, "final", "identity", fold=False)
            continue
        space = f"{layer.block}.{reads.get(layer.role, 'attention')}"
        weights = e.source.augmented(own.name), e.target.augmented(layer.name)
        polar, built = output_map(e.moments[space], *weights, recipe=recipe, grams=e.grams.get(space))
        out.add(layer.name, polar, e.moments[space].count, built)
        out.rules[layer.name] = Rule(own.name, space, layer.name, fold=False)
    for own_norm, norm, name in e.norms():
        for part in ("weight", "bias"):
            out.vectors[f"{norm}.{part}"] = Rule(f"{own_norm}.{part}", "identity", name, fold=False)
    return out


def comparable(moment: CrossMoment, grams: Grams | None, recipe: Recipe) -> Tensor:
    """What a map is the polar factor of, [dS, dT]: the cross-moment, centred and whitened where the recipe says so.

    Args:
        moment: uncentred; grams: of both sides, where the recipe whitens.
    """
    if recipe.center:
        moment, grams = moment.centred(), grams and (grams[0].centred(), grams[1].centred())
    if grams is None:
        return moment.cross
    return whiten(moment.cross, (grams[0].cross, grams[1].cross), power=recipe.whiten_power, eps=recipe.whiten_eps)


def output_map(
    moment: CrossMoment, source: Tensor, target: Tensor, *, recipe: Recipe, grams: Grams | None = None
) -> tuple[Polar, Map]:
    """Map between two layers' outputs, from the moment of their inputs.

    Where both layers expand (out > in + 1), ``[W b] = Q R`` and T = Q_S polar(R_S M R_T^T) Q_T^T: the cross has rank at
    most in + 1, so the small polar factor holds all the data determines.

    Args:
        moment: of the layers' inputs, uncentred (the recipe says whether to centre); grams: likewise, of both sides.
        source: augmented weight [W b] [out_S, in_S + 1]; target: likewise.

    Returns:
        The polar factor that was computed (the small one where factored), and the map.
    """
    s, t = source.to(moment.cross), target.to(moment.cross)
    expands = all(w.shape[0] > w.shape[1] for w in (s, t)) and recipe.null != "svd"
    if expands:
        (q_s, s), (q_t, t) = torch.linalg.qr(s), torch.linalg.qr(t)
    own = grams and (grams[0].derive(s, s), grams[1].derive(t, t))
    polar = procrustes(comparable(moment.derive(s, t), own, recipe), null=recipe.null, floor=recipe.floor)
    return polar, maps.Factored(q_s @ polar.map, q_t.T.contiguous()) if expands else maps.Dense(polar.map)
