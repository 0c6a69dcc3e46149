"""The ``coherent`` recipe: one map per space, shared by all that read or write it, scaled by energies.

Exact where the two bases are re-parametrisations of each other: rotated or widened residual, permuted or duplicated
heads and neurons, new gains, per-head scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import maps
from .links import after_name
from .moments import CrossMoment, Energy
from .pairing import pair_heads
from .procrustes import Polar, procrustes
from .recipes import Evidence, Plan, Recipe, Rule
from .regression import regressed
from .spaces import Role

QKV: tuple[Role, ...] = ("query", "key", "value")


def plan(e: Evidence, recipe: Recipe) -> Plan:
    """Maps, rules and scales from the evidence."""
    source, target = e.source.layout, e.target.layout
    out, layer_norm = Plan(), target.family.norm == "layer"
    whitened = math.sqrt(target.width / source.width) if recipe.scale != "none" else 1.0  # energy of z is its width
    z = {name: _normalised(e, name) for name in e.moments if e.links[name].target.norm}
    together: Tensor = sum(moment.cross for moment in z.values())  # type: ignore[assignment]
    for name, moment in z.items():
        out.add(name, procrustes(moment.cross, null=recipe.null, floor=recipe.floor, toward=together), moment.count)
    behind = "embedding" if "embedding" in z else "0.attention"
    reads_embedding = e.blocks[0] == 0
    first = "0.attention" if reads_embedding else behind  # the residual's map where nothing but embeddings wrote it
    embedding = behind
    if recipe.completion == "deeper" and min(_rank(out, name) for name in {first, behind}) < _full_rank(e):
        # few token types: lean on deeper spaces where the first says nothing
        for name in sorted({first, behind}):
            polar = procrustes(z[name].cross, null="completed", floor=recipe.floor, toward=together)
            out.add(f"{name}.completed", polar, z[name].count)
        first, embedding = f"{first}.completed", f"{behind}.completed"

    def written(name: str) -> float:
        """Scale of an output that writes the residual."""
        energy = e.energies[name]
        own = energy.centred if layer_norm else (float(energy.source.sum()), float(energy.target.sum()))
        return _scale(*own, recipe)

    pairs = list(e.pairs())
    for b in (b for b, own in enumerate(e.blocks) if own is not None):
        middle = e.moments[f"{b}.middle"]
        energies = (middle.source_energy, middle.target_energy)
        polar = procrustes(middle.cross, null=recipe.null, floor=recipe.floor, energies=energies)
        out.add(f"{b}.middle", polar, middle.count)
        alive = [x > recipe.floor**2 * x.max() for x in energies]
        reads = first if b == 0 and reads_embedding else f"{b}.attention"
        for own, layer in pairs:
            if layer.block != b:
                continue
            match layer.role:
                case "query" | "key" | "value":
                    rule = Rule(own.name, reads, f"{b}.{layer.role}", whitened)
                case "output":
                    rule = Rule(own.name, f"{b}.context", f"{b}.mlp", 1.0, written(layer.name))
                case "expand":
                    seen = e.energies[layer.name]
                    scale = _scale(float(seen.source[alive[0]].sum()), float(seen.target[alive[1]].sum()), recipe)
                    rule = Rule(own.name, f"{b}.mlp", f"{b}.middle", whitened, scale)
                case _:
                    inner = _scale(float(middle.source_energy.sum()), float(middle.target_energy.sum()), recipe)
                    after = after_name(source, target, e.blocks, b)
                    rule = Rule(own.name, f"{b}.middle", after, inner, written(layer.name))
            out.rules[layer.name] = rule
        _head_maps(e, out, b, recipe)
        if recipe.scale != "regression":  # nothing asks for them again, and those of a wide MLP are the largest
            del middle, e.moments[f"{b}.context"], e.moments[f"{b}.middle"]
    for own, layer in pairs:
        if layer.role == "head" and recipe.head == "move":
            out.rules[layer.name] = Rule(own.name, "final", "identity", whitened)
    if recipe.scale == "regression":
        regressed(e, out, z)
    token = target.family.embedding("token")
    if token and target.tied and layer_norm:  # a head reads the mean too: mean goes to mean
        polar_map = out.maps[embedding](torch.eye(source.width, dtype=torch.float64))
        out.maps["token"] = maps.Dense(polar_map + 1 / math.sqrt(source.width * target.width))
    for name, into in e.embeddings() if recipe.embeddings == "move" else ():
        output = "token" if token and into == token.name and "token" in out.maps else embedding
        out.vectors[into] = Rule(name, "identity", output, 1.0, written("embedding.output"))
    _norm_vectors(e, out, first, whitened, written)
    return out


def _norm_vectors(e: Evidence, out: Plan, first: str, whitened: float, written: Callable[[str], float]) -> None:
    """Gains and biases that no linear layer can take up: of the final norm (where no head moves), of a norm whose
    output is the residual itself, and of norms inside the heads."""
    for own, into, name in e.unread():
        residual = name == "embedding"
        output = first if residual else name
        out.vectors[f"{into}.weight"] = Rule(f"{own}.weight", "identity", output, kind="gain")
        out.vectors[f"{into}.bias"] = (
            Rule(f"{own}.bias", "identity", output, 1.0, written("embedding.norm"))
            if residual
            else Rule(f"{own}.bias", "identity", output, 1.0, whitened, kind="shift")
        )


def _head_maps(e: Evidence, out: Plan, b: int, recipe: Recipe) -> None:
    """Maps ``b.query``, ``b.key``, ``b.value`` (outputs) and ``b.context`` (read by the output projection)."""
    source, target = e.source.layout, e.target.layout
    names: dict[Role, tuple[str, str]] = {la.role: (own.name, la.name) for own, la in e.pairs() if la.block == b}
    context = e.moments[f"{b}.context"]
    heads, kv_heads = (source.heads, target.heads), (source.kv_heads, target.kv_heads)
    pairing = out.pairings[b] = pair_heads(context, heads, kv_heads)
    group = torch.arange(target.heads) // (target.heads // target.kv_heads)  # target kv head of each target query head

    def energies(energy: tuple[Tensor, Tensor], counts: tuple[int, int], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Per target kv head, (source, target) energy over its heads; a source head counts once per copy."""
        per = [v.unflatten(0, (n, -1)).sum(1).cpu() for v, n in zip(energy, counts, strict=True)]
        per[0] = per[0][chosen]
        return tuple(_by_group(v, target.kv_heads) for v in per)  # type: ignore[return-value]

    def cross_of(role: Role, counts: tuple[int, int], chosen: Tensor) -> Tensor:
        """Cross of paired heads of q or k, before rotary embedding: [kv_heads_T, head_dim_S, head_dim_T]."""
        moment = e.moments[f"{b}.attention"].augmented.cpu()
        w_s, w_t = (base.augmented(n).cpu() for base, n in zip((e.source, e.target), names[role], strict=True))
        left = (w_s @ moment).unflatten(0, (counts[0], -1))[chosen]
        return _by_group(left @ w_t.unflatten(0, (counts[1], -1)).mT, target.kv_heads)

    def blocks(polar: Polar, scale: Tensor, chosen: Tensor, of_group: Tensor, count: int) -> maps.Heads:
        return maps.Heads(chosen, (polar.map.cpu() * scale[:, None, None])[of_group], count)

    query, key, value = (e.energies[names[role][1]] for role in QKV)
    e_query = energies((query.source, query.target), heads, pairing.query)
    e_key = energies((key.source, key.target), kv_heads, pairing.kv)
    e_value = energies((value.source, value.target), kv_heads, pairing.kv)
    e_context = energies((context.source_energy, context.target_energy), heads, pairing.query)

    cross = context.cross.cpu().unflatten(1, (target.heads, -1)).unflatten(0, (source.heads, -1)).transpose(1, 2)
    paired = _by_group(cross[pairing.query, torch.arange(target.heads)], target.kv_heads)
    t_context = procrustes(paired, null=recipe.null, floor=recipe.floor)
    shared = sum(
        cross_of(role, counts, chosen) / _positive((e_s * e_t).sqrt())[:, None, None]
        for role, counts, chosen, (e_s, e_t) in (
            (QKV[0], heads, pairing.query, e_query),
            (QKV[1], kv_heads, pairing.kv, e_key),
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
    if recipe.heads == "dense":
        _dense_context(out, b, context, value, names, recipe)


def _dense_context(
    out: Plan, b: int, context: CrossMoment, value: Energy, names: dict[Role, tuple[str, str]], recipe: Recipe
) -> None:
    """One map and one scale for v's output and o's input, in place of those per head."""
    polar = procrustes(context.cross, null=recipe.null, floor=recipe.floor)
    out.add(f"{b}.context", polar, context.count)
    out.maps[f"{b}.value"] = out.maps[f"{b}.context"]
    sides = (context.source_energy, context.target_energy), (value.source, value.target)
    read, written = (_scale(float(s.sum()), float(t.sum()), recipe) for s, t in sides)
    value_layer, output_layer = names["value"][1], names["output"][1]
    out.rules[value_layer] = replace(out.rules[value_layer], scale_out=written)
    out.rules[output_layer] = replace(out.rules[output_layer], scale_in=read)


def _normalised(e: Evidence, space: str) -> CrossMoment:
    """The moment of z, behind the norms' gains and biases; under LayerNorm with its exact null direction removed."""
    link = e.links[space]
    source = e.source.norm(link.source.norm, link.source.width)
    z = e.moments[space].unfold(source, e.target.norm(link.target.norm, link.target.width), link.target.norm)
    if e.target.layout.family.norm == "layer":  # every row of z sums to 0
        cross = z.cross - z.cross.mean(0)
        z = replace(z, cross=cross - cross.mean(1, keepdim=True))
    return z


def _full_rank(e: Evidence) -> int:
    return min(e.source.layout.width, e.target.layout.width) - (e.target.layout.family.norm == "layer")


def _rank(out: Plan, name: str) -> int:
    return next(r.rank for r in out.reports if r.space == name)


def _scale(source: float, target: float, recipe: Recipe) -> float:
    """sqrt(E_T / E_S); 1 where a side has no energy (its map is then zero)."""
    return math.sqrt(target / source) if recipe.scale != "none" and source > 0 and target > 0 else 1.0


def _ratios(energies: tuple[Tensor, Tensor], recipe: Recipe) -> Tensor:
    return torch.tensor(
        [_scale(float(s), float(t), recipe) for s, t in zip(*energies, strict=True)], dtype=torch.float64
    )


def _by_group(per_head: Tensor, groups: int) -> Tensor:
    grouped: Tensor = per_head.unflatten(0, (groups, -1))
    return grouped.sum(1)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)
