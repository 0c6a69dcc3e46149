"""The ``coherent`` recipe: one map per space, shared by all that read or write it, scaled by energies.

Exact where the two bases are re-parametrisations of each other: rotated or widened residual, permuted or duplicated
heads and neurons, new gains, per-head scales.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from . import maps
from .moments import CrossMoment, Energy
from .pairing import pair_heads
from .procrustes import Polar, procrustes
from .recipes import Evidence, Plan, Recipe, Rule


def plan(e: Evidence, recipe: Recipe) -> Plan:
    """Maps, rules and scales from the evidence."""
    source, target = e.source.layout, e.target.layout
    family, out = target.family, Plan()
    whitened = math.sqrt(target.width / source.width) if recipe.scale == "norm" else 1.0  # energy of z is its width
    z = {name: _normalised(e, name) for name in e.moments if e.norm_of(name)}
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
        energies = (middle.source_energy, middle.target_energy)
        polar = procrustes(middle.cross, null=recipe.null, floor=recipe.floor, energies=energies)
        out.add(f"{b}.middle", polar, middle.count)
        alive = [x > recipe.floor**2 * x.max() for x in energies]
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


def _normalised(e: Evidence, space: str) -> CrossMoment:
    """The moment of z, behind the norm's gain and bias; under LayerNorm with its exact null direction removed."""
    norm = e.norm_of(space)
    source, target = (base.norm(norm, base.layout.width) for base in (e.source, e.target))
    z = e.moments[space].unfold(source, target, norm)
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
