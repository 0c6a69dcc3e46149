"""Scales by least squares instead of by energies: how well a map predicts, forward at outputs and backward at inputs.

With c = tr(T^T C) / sqrt(E_S E_T), the cosine of ``x_S @ T`` and ``x_T``, the factor that best predicts the target's
output is c sqrt(E_T / E_S), and the one that best predicts the source's input from the target's c sqrt(E_S / E_T).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .maps import Heads, Map
from .moments import CrossMoment
from .recipes import Evidence, Plan

LEAST = 1e-6  # a cosine below it says nothing; the update through it vanishes
READS = {"output": "context", "expand": "mlp", "contract": "middle"}


def regressed(e: Evidence, out: Plan, z: Mapping[str, CrossMoment]) -> None:
    """Turn the scales of a plan's rules, made from energies, into those of the two regressions.

    Args:
        z: by link, the moments behind norms; other inputs are as captured.
    """
    layer_norm = e.target.layout.family.norm == "layer"
    for own, layer in ((own, layer) for own, layer in e.pairs() if layer.name in out.rules):
        rule = out.rules[layer.name]
        link = "final" if layer.role == "head" else f"{layer.block}.{READS.get(layer.role, 'attention')}"
        read = z.get(link, e.moments[link])
        inner = max(LEAST, cosine(out.maps[rule.input], read.cross, (read.source_energy, read.target_energy)))
        outer = 1.0
        if layer.role != "head":
            seen = e.energies[layer.name]
            writes = layer_norm and layer.role in ("output", "contract")
            totals = torch.tensor(seen.centred, dtype=torch.float64)
            energies = (totals[0], totals[1]) if writes else (seen.source, seen.target)
            sides = ((e.source, own), (e.target, layer))
            weights = [base.augmented(la.name).to(read.cross) for base, la in sides]
            behind = [base.vector(la.scale or "", len(w), 1.0) for (base, la), w in zip(sides, weights, strict=True)]
            cross = e.moments[link].derive(*(v.to(w)[:, None] * w for v, w in zip(behind, weights, strict=True))).cross
            outer = max(LEAST, cosine(out.maps[rule.output], cross, energies))
        out.rules[layer.name] = replace(rule, scale_in=rule.scale_in / inner, scale_out=rule.scale_out * outer)


def cosine(t: Map, cross: Tensor, energies: tuple[Tensor, Tensor]) -> float:
    """tr(T^T C) / sqrt(E_S E_T) in [-1, 1], scales inside T taken out; 0 where a side has no energy.

    Args:
        cross: [dS, dT]; energies: per feature, or in total, of source and target.
    """
    own, other = energies
    if isinstance(t, Heads):  # block by block, without scales; a source head counts once per copy
        size = torch.linalg.matrix_norm(t.blocks, 2).clamp(min=torch.finfo(torch.float64).tiny)
        t = replace(t, blocks=t.blocks / size[:, None, None])
        own = own.unflatten(0, (t.heads, -1))[t.source_head.to(own.device)]
    energy = float(own.sum() * other.sum())
    return float(t(cross.T).trace()) / energy**0.5 if energy > 0 else 0.0
