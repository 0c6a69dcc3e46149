"""Scales by least squares instead of by energies: how well a map predicts, forward at outputs and backward at inputs.

With c = tr(T^T C) / sqrt(E_S E_T), the cosine of ``x_S @ T`` and ``x_T``, the factor that best predicts the target's
output is c sqrt(E_T / E_S), and the one that best predicts the source's input from the target's c sqrt(E_S / E_T).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..activations.moments import CrossMoment, Energy
from ..models.base import Base
from ..models.geometry import Layer
from .maps import Map, cosine
from .ruleset import Rule

LEAST = 1e-6  # a cosine below it says nothing; the update through it vanishes
Side = tuple[Base, Layer]


def fit_input(rule: Rule, t: Map, read: CrossMoment) -> Rule:
    """The rule with the input's scale, made from energies, by regression.

    Args:
        t: map of the input. read: moment of what it maps, energies included.
    """
    inner = max(LEAST, cosine(t, partial(_trace, read.cross), (read.source_energy, read.target_energy)))
    return replace(rule, scale_in=rule.scale_in / inner)


def fit_output(rule: Rule, t: Map, read: CrossMoment, sides: tuple[Side, Side], seen: Energy) -> Rule:
    """The rule with the output's scale, made from energies, by regression.

    Args:
        t: map of the output. read: moment of the layers' inputs, as captured. sides: both layers, source first.
        seen: energies of their outputs.
    """
    (_, _), (target, layer) = sides
    writes = target.geometry.family.norm == "layer" and layer.role in ("output", "contract")
    totals = torch.tensor(seen.centred, dtype=torch.float64)
    energies = (totals[0], totals[1]) if writes else (seen.source, seen.target)
    weights = [base.augmented(la.name).to(read.cross) for base, la in sides]
    behind = [base.vector(la.scale or "", len(w), 1.0) for (base, la), w in zip(sides, weights, strict=True)]
    cross = read.derive(*(v.to(w)[:, None] * w for v, w in zip(behind, weights, strict=True))).cross
    outer = max(LEAST, cosine(t, partial(_trace, cross), energies))
    return replace(rule, scale_out=rule.scale_out * outer)


def _trace(cross: Tensor, t: Map) -> float:
    """tr(T^T C) of the cross-moment C [dS, dT]."""
    return float(t(cross.T).trace())
