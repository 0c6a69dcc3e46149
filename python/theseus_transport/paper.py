"""The ``paper`` recipe: every layer's own input and output, no scales, as in arXiv 2602.12952."""

from __future__ import annotations

import torch
from torch import Tensor

from . import maps
from .maps import Map
from .moments import CrossMoment
from .procrustes import Polar, procrustes
from .recipes import Evidence, Plan, Recipe, Rule


def plan(e: Evidence, recipe: Recipe) -> Plan:
    """Maps and rules from the evidence; no scales."""
    out = Plan()
    seen = {name: moment.centred() if recipe.center else moment for name, moment in e.moments.items()}
    for name, moment in seen.items():
        out.add(name, procrustes(moment.cross, null=recipe.null, floor=recipe.floor), moment.count)
    reads = {"output": "context", "expand": "mlp", "contract": "middle"}
    for own, layer in e.pairs():
        if layer.role == "head":
            out.rules[layer.name] = Rule(own.name, "final", "identity", fold=False)
            continue
        space = f"{layer.block}.{reads.get(layer.role, 'attention')}"
        weights = e.source.augmented(own.name), e.target.augmented(layer.name)
        polar, built = output_map(e.moments[space], *weights, recipe=recipe)
        out.add(layer.name, polar, seen[space].count, built)
        out.rules[layer.name] = Rule(own.name, space, layer.name, fold=False)
    for own_norm, norm, name in e.norms():
        for part in ("weight", "bias"):
            out.vectors[f"{norm}.{part}"] = Rule(f"{own_norm}.{part}", "identity", name, fold=False)
    return out


def output_map(moment: CrossMoment, source: Tensor, target: Tensor, *, recipe: Recipe) -> tuple[Polar, Map]:
    """Map between two layers' outputs, from the moment of their inputs.

    Where both layers expand (out > in + 1), ``[W b] = Q R`` and T = Q_S polar(R_S M R_T^T) Q_T^T: the cross has rank at
    most in + 1, so the small polar factor holds all the data determines.

    Args:
        moment: of the layers' inputs, uncentred (the recipe says whether to centre).
        source: augmented weight [W b] [out_S, in_S + 1]; target: likewise.

    Returns:
        The polar factor that was computed (the small one where factored), and the map.
    """
    if any(w.shape[0] <= w.shape[1] for w in (source, target)) or recipe.null == "svd":
        outputs = moment.derive(source, target)
        cross = outputs.centred().cross if recipe.center else outputs.cross
        polar = procrustes(cross, null=recipe.null, floor=recipe.floor)
        return polar, maps.Dense(polar.map)
    (q_s, r_s), (q_t, r_t) = (torch.linalg.qr(w.to(moment.cross)) for w in (source, target))
    inputs = moment.augmented
    if recipe.center:  # the means leave the moment of [x 1] as a Schur complement
        inputs = inputs - inputs[:, -1:] * inputs[-1:] / inputs[-1, -1]
    polar = procrustes(r_s @ inputs @ r_t.T, null=recipe.null, floor=recipe.floor)
    return polar, maps.Factored(q_s @ polar.map, q_t.T.contiguous())
