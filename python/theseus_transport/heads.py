"""The ``coherent`` recipe inside attention: maps head by head, scales included."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from . import maps
from .moments import CrossMoment, Energy
from .pairing import pair_heads
from .planner import Planner
from .procrustes import Polar, procrustes
from .recipes import Plan, Recipe
from .spaces import Role

QKV: tuple[Role, ...] = ("query", "key", "value")
Names = dict[Role, tuple[str, str]]  # (source, target) layer of each role


def head_maps(p: Planner, b: int) -> None:
    """Maps ``b.query``, ``b.key``, ``b.value`` (outputs) and ``b.context`` (read by the output projection).

    Those of v, or of q and k, only where the energies they are made from arrived.
    """
    source, target, out, recipe = p.source.layout, p.target.layout, p.plan, p.recipe
    names: Names = {la.role: (own.name, la.name) for own, la in p.pairs.layers(b)}
    context = p.moments[f"{b}.context"]
    heads, kv_heads = (source.heads, target.heads), (source.kv_heads, target.kv_heads)
    pairing = out.pairings[b] = pair_heads(context, heads, kv_heads)
    group = torch.arange(target.heads) // (target.heads // target.kv_heads)  # target kv head of each target query head
    every = torch.arange(target.kv_heads)

    def energies(energy: tuple[Tensor, Tensor], counts: tuple[int, int], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Per target kv head, (source, target) energy over its heads; a source head counts once per copy."""
        per = [v.unflatten(0, (n, -1)).sum(1) for v, n in zip(energy, counts, strict=True)]
        per[0] = per[0][chosen]
        return tuple(_by_group(v, target.kv_heads) for v in per)  # type: ignore[return-value]

    def cross_of(role: Role, counts: tuple[int, int], chosen: Tensor) -> Tensor:
        """Cross of paired heads of q or k, before rotary embedding: [kv_heads_T, head_dim_S, head_dim_T]."""
        moment = p.moments[f"{b}.attention"].augmented
        w_s, w_t = (base.augmented(n).to(moment) for base, n in zip((p.source, p.target), names[role], strict=True))
        left = (w_s @ moment).unflatten(0, (counts[0], -1))[chosen]
        return _by_group(left @ w_t.unflatten(0, (counts[1], -1)).mT, target.kv_heads)

    def blocks(polar: Polar, scale: Tensor, chosen: Tensor, of_group: Tensor, count: int) -> maps.Heads:
        return maps.Heads(chosen, (polar.map.cpu() * scale[:, None, None])[of_group], count)

    cross = context.cross.unflatten(1, (target.heads, -1)).unflatten(0, (source.heads, -1)).transpose(1, 2)
    paired = _by_group(cross[pairing.query, torch.arange(target.heads)], target.kv_heads)
    t_context = procrustes(paired, null=recipe.null, floor=recipe.floor)
    e_context = energies((context.source_energy, context.target_energy), heads, pairing.query)
    copies = torch.bincount(pairing.query, minlength=source.heads)[pairing.query].double()
    read = blocks(t_context, 1 / _ratios(e_context, recipe), pairing.query, group, source.heads)
    read = replace(read, blocks=read.blocks / copies[:, None, None])
    out.add(f"{b}.context", t_context, context.count, read)

    query, key, value = (p.energies.get(names[role][1]) for role in QKV)
    if value:
        e_value = energies((value.source, value.target), kv_heads, pairing.kv)
        out.put(f"{b}.value", blocks(t_context, _ratios(e_value, recipe), pairing.kv, every, source.kv_heads))
    if query and key and f"{b}.attention" in p.moments:
        e_query = energies((query.source, query.target), heads, pairing.query)
        e_key = energies((key.source, key.target), kv_heads, pairing.kv)
        shared = sum(
            cross_of(role, counts, chosen) / _positive((e_s * e_t).sqrt())[:, None, None]
            for role, counts, chosen, (e_s, e_t) in (
                (QKV[0], heads, pairing.query, e_query),
                (QKV[1], kv_heads, pairing.kv, e_key),
            )
        )
        t_shared = procrustes(shared, null=recipe.null, floor=recipe.floor)  # type: ignore[arg-type]
        mapped = blocks(t_shared, _ratios(e_query, recipe), pairing.query, group, source.heads)
        out.add(f"{b}.query", t_shared, context.count, mapped)
        out.put(f"{b}.key", blocks(t_shared, _ratios(e_key, recipe), pairing.kv, every, source.kv_heads))
    if recipe.heads == "dense":
        _dense_context(out, b, context, value, names, recipe)


def _dense_context(out: Plan, b: int, context: CrossMoment, value: Energy | None, names: Names, recipe: Recipe) -> None:
    """One map and one scale for v's output and o's input, in place of those per head."""
    polar = procrustes(context.cross, null=recipe.null, floor=recipe.floor)
    out.add(f"{b}.context", polar, context.count)
    if (layer := names["output"][1]) in out.rules:
        read = scale_of(float(context.source_energy.sum()), float(context.target_energy.sum()), recipe)
        out.rules[layer] = replace(out.rules[layer], scale_in=read)
    if value:
        out.put(f"{b}.value", out.maps[f"{b}.context"])
    if value and (layer := names["value"][1]) in out.rules:
        written = scale_of(float(value.source.sum()), float(value.target.sum()), recipe)
        out.rules[layer] = replace(out.rules[layer], scale_out=written)


def scale_of(source: float, target: float, recipe: Recipe) -> float:
    """sqrt(E_T / E_S) of two energies; 1 where a side has none (its map is then zero)."""
    return math.sqrt(target / source) if recipe.scale != "none" and source > 0 and target > 0 else 1.0


def _ratios(energies: tuple[Tensor, Tensor], recipe: Recipe) -> Tensor:
    return torch.tensor(
        [scale_of(s, t, recipe) for s, t in zip(*(e.tolist() for e in energies), strict=True)], dtype=torch.float64
    )


def _by_group(per_head: Tensor, groups: int) -> Tensor:
    grouped: Tensor = per_head.unflatten(0, (groups, -1))
    return grouped.sum(1)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)
