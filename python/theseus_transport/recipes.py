"""Which map and which scale each layer gets, from moments and energies: the recipes, field by field.

``coherent``: every space has one map, scales included, gains folded into the layers that read them; exact where the
two bases are re-parametrisations of each other. ``paper``: every layer's own input and output, no scales
(arXiv 2602.12952).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from . import maps
from .errors import InputRefused, NumericalError
from .maps import Map
from .models import Base
from .moments import CrossMoment, Energy
from .pairing import HeadPairing, pair_heads
from .procrustes import FLOOR, Null, Polar, procrustes


@dataclass(frozen=True)
class Recipe:
    """A frozen set of choices.

    Attributes:
        name: ``coherent`` or ``paper``.
        null: what fills directions the data does not determine (see :func:`procrustes`).
        floor: share of the largest singular value below which a direction is undetermined.
        scale: ``norm`` scales by the ratio of energies, ``none`` does not (``paper`` never does).
        center: remove means before aligning (``paper`` only).
    """

    name: Literal["coherent", "paper"] = "coherent"
    null: Null = "partial"
    floor: float = FLOOR
    scale: Literal["norm", "none"] = "norm"
    center: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("name", ("coherent", "paper")), ("scale", ("norm", "none"))):
            if (value := getattr(self, name)) not in choices:
                raise InputRefused(f"recipe {name} is {value!r}; choose one of {', '.join(choices)}")
        if self.center and self.name == "coherent":
            raise InputRefused("center belongs to the paper recipe; coherent aligns uncentred activations")

    @classmethod
    def named(cls, recipe: str | Recipe, **options: object) -> Recipe:
        """A recipe by name with options, or a recipe with options replaced."""
        base = recipe if isinstance(recipe, Recipe) else cls(name=recipe)  # type: ignore[arg-type]
        return replace(base, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Rule:
    """How one layer's update moves: ``dW_T = s_out / s_in * T_out^T dW_S T_in``, ``db_T = s_out T_out^T db_S``.

    ``input`` and ``output`` name maps; ``fold`` says whether the norm in front is folded into the weight.
    """

    input: str
    output: str
    scale_in: float = 1.0
    scale_out: float = 1.0
    fold: bool = True


@dataclass(frozen=True)
class MapReport:
    """What is known of one map: sizes, determined rank, gap (smallest kept singular value over the largest), tokens."""

    space: str
    source: int
    target: int
    rank: int
    gap: float
    tokens: int

    @property
    def weak(self) -> bool:
        """Fewer than half of the directions are determined."""
        return self.rank < min(self.source, self.target) / 2


@dataclass
class Plan:
    """What a recipe decides: maps by name, a rule per layer, maps of norms' own vectors, and what to report."""

    maps: dict[str, Map] = field(default_factory=lambda: {"identity": maps.Identity()})
    rules: dict[str, Rule] = field(default_factory=dict)
    vectors: dict[str, Rule] = field(default_factory=dict)
    reports: list[MapReport] = field(default_factory=list)
    pairings: dict[int, HeadPairing] = field(default_factory=dict)

    def add(self, name: str, polar: Polar, tokens: int, built: Map | None = None) -> None:
        self.maps[name] = built or maps.Dense(polar.map)
        size = polar.map.shape[-2:]
        batch = max(polar.rank.numel(), 1)  # per-head maps are reported as one block-diagonal map
        self.reports.append(
            MapReport(name, batch * size[0], batch * size[1], int(polar.rank.sum()), float(polar.gap.min()), tokens)
        )


@dataclass(frozen=True)
class Evidence:
    """All a recipe may look at: two bases, moments by space, energies by output."""

    source: Base
    target: Base
    moments: dict[str, CrossMoment]
    energies: dict[str, Energy]


def plan(evidence: Evidence, recipe: Recipe) -> Plan:
    """The maps and rules of a recipe.

    Raises:
        NumericalError: a moment holds NaN or Inf (named), or a map fails its certificate.
    """
    for name, moment in evidence.moments.items():
        if not bool(torch.isfinite(moment.augmented).all()):
            raise NumericalError(
                f"activations of space {name} held NaN or Inf; check the base models and the calibration"
            )
    return (_coherent if recipe.name == "coherent" else _paper)(evidence, recipe)


def _coherent(e: Evidence, recipe: Recipe) -> Plan:
    source, target = e.source.layout, e.target.layout
    family, out = target.family, Plan()
    whitened = math.sqrt(target.width / source.width) if recipe.scale == "norm" else 1.0  # energy of z is its width
    z = {name: _normalised(e, name) for name in e.moments if _norm_of(e, name)}
    together: Tensor = sum(moment.cross for moment in z.values())  # type: ignore[assignment]
    for name, moment in z.items():
        out.add(name, procrustes(moment.cross, null=recipe.null, floor=recipe.floor, toward=together), moment.count)
    first = "0.attention"
    if out.reports[0].rank < _full_rank(e):  # few token types: lean on deeper spaces where the first says nothing
        polar = procrustes(z[first].cross, null="completed", floor=recipe.floor, toward=together)
        out.add("embedding", polar, z[first].count)
        first = "embedding"

    def total(layer: str, energy: Energy) -> float:
        """Scale of an output that writes the residual."""
        own = energy.centred if family.norm == "layer" else (float(energy.source.sum()), float(energy.target.sum()))
        return _scale(*own, recipe)

    for b in range(target.depth):
        middle = e.moments[f"{b}.middle"]
        out.add(f"{b}.middle", procrustes(middle.cross, null=recipe.null, floor=recipe.floor), middle.count)
        alive = (middle.source_energy > 0, middle.target_energy > 0)
        reads = {"query": first if b == 0 else f"{b}.attention", "expand": f"{b}.mlp"}
        after = f"{b + 1}.attention" if b + 1 < target.depth else "final"
        _head_maps(e, out, b, recipe)
        for layer in (la for la in target.layers() if la.block == b):
            own = e.energies[layer.name]
            match layer.role:
                case "query" | "key" | "value":
                    rule = Rule(reads["query"], f"{b}.{layer.role}", whitened)
                case "output":
                    rule = Rule(f"{b}.context", f"{b}.mlp", 1.0, total(layer.name, own))
                case "expand":
                    scale = _scale(float(own.source[alive[0]].sum()), float(own.target[alive[1]].sum()), recipe)
                    rule = Rule(reads["expand"], f"{b}.middle", whitened, scale)
                case "contract":
                    inner = _scale(float(middle.source_energy.sum()), float(middle.target_energy.sum()), recipe)
                    rule = Rule(f"{b}.middle", after, inner, total(layer.name, own))
                case _:
                    continue
            out.rules[layer.name] = rule
    for name in family.heads:
        out.rules[name] = Rule("final", "identity", whitened)
    for name in family.embeddings:
        out.vectors[name] = Rule("identity", first, 1.0, total("embedding", e.energies["embedding"]))
    return out


def _head_maps(e: Evidence, out: Plan, b: int, recipe: Recipe) -> None:
    """Maps ``b.query``, ``b.key``, ``b.value`` (outputs) and ``b.context`` (read by the output projection)."""
    source, target, family = e.source.layout, e.target.layout, e.target.layout.family
    context = e.moments[f"{b}.context"]
    heads, kv_heads = (source.heads, target.heads), (source.kv_heads, target.kv_heads)
    pairing = out.pairings[b] = pair_heads(context, heads, kv_heads)
    group = torch.arange(target.heads) // (target.heads // target.kv_heads)  # target kv head of each target query head

    def energies(energy: tuple[Tensor, Tensor], counts: tuple[int, int], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Per target kv head, (source, target) energy over its heads; a source head counts once per copy."""
        per = [v.unflatten(0, (n, -1)).sum(1).cpu() for v, n in zip(energy, counts, strict=True)]
        per[0] = per[0][chosen]
        return tuple(_by_group(v, target.kv_heads) for v in per)  # type: ignore[return-value]

    def cross_of(layer: str, counts: tuple[int, int], chosen: Tensor) -> Tensor:
        """Cross of paired heads of q or k, before rotary embedding: [kv_heads_T, head_dim_S, head_dim_T]."""
        moment = e.moments[f"{b}.attention"].augmented.cpu()
        w_s, w_t = (base.augmented(target.block(b, layer)).cpu() for base in (e.source, e.target))
        left = (w_s @ moment).unflatten(0, (counts[0], -1))[chosen]
        return _by_group(left @ w_t.unflatten(0, (counts[1], -1)).mT, target.kv_heads)

    def blocks(polar: Polar, scale: Tensor, chosen: Tensor, of_group: Tensor, count: int) -> maps.Heads:
        return maps.Heads(chosen, (polar.map.cpu() * scale[:, None, None])[of_group], count)

    query, key, value = (e.energies[target.block(b, n)] for n in (family.query, family.key, family.value))
    e_query = energies((query.source, query.target), heads, pairing.query)
    e_key = energies((key.source, key.target), kv_heads, pairing.kv)
    e_value = energies((value.source, value.target), kv_heads, pairing.kv)
    e_context = energies((context.source_energy, context.target_energy), heads, pairing.query)

    cross = context.cross.cpu().unflatten(1, (target.heads, -1)).unflatten(0, (source.heads, -1)).transpose(1, 2)
    paired = _by_group(cross[pairing.query, torch.arange(target.heads)], target.kv_heads)
    t_context = procrustes(paired, null=recipe.null, floor=recipe.floor)
    shared = sum(
        cross_of(name, counts, chosen) / _positive((e_s * e_t).sqrt())[:, None, None]
        for name, counts, chosen, (e_s, e_t) in (
            (family.query, heads, pairing.query, e_query),
            (family.key, kv_heads, pairing.kv, e_key),
        )
    )
    t_shared = procrustes(shared, null=recipe.null, floor=recipe.floor)  # type: ignore[arg-type]

    every = torch.arange(target.kv_heads)
    copies = torch.bincount(pairing.query, minlength=source.heads)[pairing.query].double()
    read = blocks(t_context, 1 / _ratios(e_context, recipe), pairing.query, group, source.heads)
    read = replace(read, blocks=read.blocks / copies[:, None, None])
    out.add(f"{b}.context", t_context, context.count, read)
    out.maps[f"{b}.value"] = blocks(t_context, _ratios(e_value, recipe), pairing.kv, every, source.kv_heads)
    out.add(
        f"{b}.query",
        t_shared,
        context.count,
        blocks(t_shared, _ratios(e_query, recipe), pairing.query, group, source.heads),
    )
    out.maps[f"{b}.key"] = blocks(t_shared, _ratios(e_key, recipe), pairing.kv, every, source.kv_heads)


def _paper(e: Evidence, recipe: Recipe) -> Plan:
    out = Plan()
    seen = {name: moment.centred() if recipe.center else moment for name, moment in e.moments.items()}
    for name, moment in seen.items():
        out.add(name, procrustes(moment.cross, null=recipe.null, floor=recipe.floor), moment.count)
    target = e.target.layout
    reads = {"output": "context", "expand": "mlp", "contract": "middle"}
    for layer in target.layers():
        if layer.role == "head":
            out.rules[layer.name] = Rule("final", "identity", fold=False)
            continue
        space = f"{layer.block}.{reads.get(layer.role, 'attention')}"
        weights = tuple(base.augmented(layer.name) for base in (e.source, e.target))
        polar, built = output_map(seen[space], *weights, recipe=recipe)
        out.add(layer.name, polar, seen[space].count, built)
        out.rules[layer.name] = Rule(space, layer.name, fold=False)
    for name in e.moments:
        if norm := _norm_of(e, name):
            out.vectors[f"{norm}.weight"] = out.vectors[f"{norm}.bias"] = Rule("identity", name, fold=False)
    return out


def output_map(moment: CrossMoment, source: Tensor, target: Tensor, *, recipe: Recipe) -> tuple[Polar, Map]:
    """Map between two layers' outputs, from the moment of their inputs.

    Where both layers expand (out > in + 1), ``[W b] = Q R`` and T = Q_S polar(R_S M R_T^T) Q_T^T: the cross has rank at
    most in + 1, so the small polar factor holds all the data determines.

    Args:
        moment: of the layers' inputs.
        source: augmented weight [W b] [out_S, in_S + 1]; target: likewise.

    Returns:
        The polar factor that was computed (the small one where factored), and the map.
    """
    if any(w.shape[0] <= w.shape[1] for w in (source, target)) or recipe.null == "svd":
        polar = procrustes(moment.derive(source, target).cross, null=recipe.null, floor=recipe.floor)
        return polar, maps.Dense(polar.map)
    (q_s, r_s), (q_t, r_t) = (torch.linalg.qr(w.to(moment.cross)) for w in (source, target))
    polar = procrustes(r_s @ moment.augmented @ r_t.T, null=recipe.null, floor=recipe.floor)
    return polar, maps.Factored(q_s @ polar.map, q_t.T.contiguous())


def _norm_of(e: Evidence, space: str) -> str | None:
    """The norm whose output this space is."""
    found = {s.name: s.module for s in e.target.layout.spaces() if s.side == "output"}
    return found.get(space)


def _normalised(e: Evidence, space: str) -> CrossMoment:
    """The moment of z, behind the norm's gain and bias; under LayerNorm with its exact null direction removed."""
    norm = _norm_of(e, space)
    z = e.moments[space].unfold(*(base.norm(norm, base.layout.width) for base in (e.source, e.target)))
    if e.target.layout.family.norm == "layer":  # every row of z sums to 0
        cross = z.cross - z.cross.mean(0)
        z = replace(z, cross=cross - cross.mean(1, keepdim=True))
    return z


def _full_rank(e: Evidence) -> int:
    return min(e.source.layout.width, e.target.layout.width) - (e.target.layout.family.norm == "layer")


def _scale(source: float, target: float, recipe: Recipe) -> float:
    """sqrt(E_T / E_S); 1 where a side has no energy (its map is then zero)."""
    return math.sqrt(target / source) if recipe.scale == "norm" and source > 0 and target > 0 else 1.0


def _ratios(energies: tuple[Tensor, Tensor], recipe: Recipe) -> Tensor:
    return torch.tensor(
        [_scale(float(s), float(t), recipe) for s, t in zip(*energies, strict=True)], dtype=torch.float64
    )


def _by_group(per_head: Tensor, groups: int) -> Tensor:
    return per_head.unflatten(0, (groups, -1)).sum(1)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)
