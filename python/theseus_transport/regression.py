"""Scales by least squares instead of by energies: how well a map predicts, forward at outputs and backward at inputs.

With c = tr(T^T C) / sqrt(E_S E_T), the cosine of ``x_S @ T`` and ``x_T``, the factor that best predicts the target's
output is c sqrt(E_T / E_S), and the one that best predicts the source's input from the target's c sqrt(E_S / E_T).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .maps import Heads, Map
from .models import Base
from .moments import CrossMoment, Energy
from .recipes import Rule
from .spaces import Layer

LEAST = 1e-6  # a cosine below it says nothing; the update through it vanishes
Side = tuple[Base, Layer]


def fit_input(rule: Rule, t: Map, read: CrossMoment) -> Rule:
    """The rule with the input's scale, made from energies, by regression.

    Args:
        t: map of the input. read: moment of what it maps, energies included.
    """
    inner = max(LEAST, cosine(t, read.cross, (read.source_energy, read.target_energy)))
    return replace(rule, scale_in=rule.scale_in / inner)


def fit_output(rule: Rule, t: Map, read: CrossMoment, sides: tuple[Side, Side], seen: Energy) -> Rule:
    """The rule with the output's scale, made from energies, by regression.

    Args:
        t: map of the output. read: moment of the layers' inputs, as captured. sides: both layers, source first.
        seen: energies of their outputs.
    """
    (_, _), (target, layer) = sides
    writes = target.layout.family.norm == "layer" and layer.role in ("output", "contract")
    totals = torch.tensor(seen.centred, dtype=torch.float64)
    energies = (totals[0], totals[1]) if writes else (seen.source, seen.target)
    weights = [base.augmented(la.name).to(read.cross) for base, la in sides]
    behind = [base.vector(la.scale or "", len(w), 1.0) for (base, la), w in zip(sides, weights, strict=True)]
    cross = read.derive(*(v.to(w)[:, None] * w for v, w in zip(behind, weights, strict=True))).cross
    outer = max(LEAST, cosine(t, cross, energies))
    return replace(rule, scale_out=rule.scale_out * outer)


def cosine(t: Map, cross: Tensor, energies: tuple[Tensor, Tensor]) -> float:
    """tr(T^T C) / sqrt(E_S E_T) in [-1, 1], scales inside T taken out; 0 where a side has no energy.

    Args:
        cross: [dS, dT]; energies: per feature, or in total, of source and target.
    """
    own, other = energies
    if isinstance(t, Heads):  # a source head counts once per copy
        t, own = t.unscaled(), t.by_head(own)
    energy = float(own.sum() * other.sum())
    return float(t(cross.T).trace()) / energy**0.5 if energy > 0 else 0.0
