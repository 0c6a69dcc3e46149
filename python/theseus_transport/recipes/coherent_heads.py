"""The ``coherent`` recipe inside attention: maps head by head, scales included."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..activations.links import Pairs, of_class
from ..activations.moments import CrossMoment, Energy
from ..linalg.procrustes import FLOOR_DOUBLE, Polar, leaning, procrustes
from ..models.geometry import Role
from . import maps
from .choices import RecipeChoices
from .head_pairing import pair_heads
from .maps import PlannedMap, doubles
from .ruleset import Ruleset
from .solver import Solver

QKV: tuple[Role, ...] = ("query", "key", "value")
Names = dict[Role, tuple[str, str]]  # (source, target) layer of each role


def planned_heads(pairs: Pairs, b: int, recipe: RecipeChoices) -> list[PlannedMap]:
    """What :func:`head_maps` will make of target block ``b``."""
    source, target = pairs.source, pairs.target
    heads = {"context": target.heads, "value": target.kv_heads, "query": target.heads, "key": target.kv_heads}
    found: list[PlannedMap] = []
    for part, count in heads.items():
        if recipe.heads == "dense" and part in ("context", "value"):
            found += doubles([(f"{b}.{part}/matrix", pairs.moments[f"{b}.context"].widths)])
            continue
        found.append((f"{b}.{part}/source_head", (count,), torch.int64))
        found.append((f"{b}.{part}/blocks", (count, source.head_dim, target.head_dim), torch.float64))
        found.append((f"{b}.{part}/heads", (), torch.int64))
    return found


def head_maps(p: Solver, b: int) -> None:
    """Make the maps ``{b}.query``, ``{b}.key``, ``{b}.value`` (outputs) and ``{b}.context`` (what o reads) of a block.

    Those of v, or of q and k, only where the energies they are made from arrived in the solver ``p``.

    Args:
        b: a paired target block.
    """
    source, target, out, recipe = p.source.geometry, p.target.geometry, p.ruleset, p.recipe
    names: Names = {la.role: (own.name, la.name) for own, la in p.pairs.layers(b)}
    context = p.moments[f"{b}.context"]
    alone = p.moments.get(of_class(f"{b}.context"))  # of the class token, where that alone matters
    # Who feeds whom. Query heads that share a key-value head share its maps too, so all sums below are per kv head.
    heads, kv_heads = (source.heads, target.heads), (source.kv_heads, target.kv_heads)
    pairing = out.pairings[b] = pair_heads(context, heads, kv_heads)
    group = torch.arange(target.heads) // (target.heads // target.kv_heads)  # target kv head of each target query head

    def of_group(per_head: Tensor) -> Tensor:
        """Sum over a target kv head's query heads, but for those left over: they may be of another kind."""
        if len(per_head) == target.kv_heads:
            return per_head
        counted = per_head * pairing.own.to(per_head).view(-1, *[1] * (per_head.ndim - 1))
        summed: Tensor = counted.unflatten(0, (target.kv_heads, -1)).sum(1)
        return summed

    def energies(energy: tuple[Tensor, Tensor], counts: tuple[int, int], chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Per target kv head, (source, target) energy over its heads."""
        own, other = (v.unflatten(0, (n, -1)).sum(1) for v, n in zip(energy, counts, strict=True))
        return of_group(own[chosen]), of_group(other)

    def cross_of(role: Role, counts: tuple[int, int], chosen: Tensor) -> Tensor:
        """Cross of paired heads of q or k, before rotary embedding: [kv_heads_T, head_dim_S, head_dim_T]."""
        moment = p.moments[f"{b}.attention"].augmented
        w_s, w_t = (base.augmented(n).to(moment) for base, n in zip((p.source, p.target), names[role], strict=True))
        left = (w_s @ moment).unflatten(0, (counts[0], -1))[chosen]
        return of_group(left @ w_t.unflatten(0, (counts[1], -1)).mT)

    def blocks(polar: Polar, scale: Tensor) -> Tensor:
        return polar.map.cpu() * scale[:, None, None]

    def paired(moment: CrossMoment) -> Tensor:
        """Crosses of paired heads, [heads_T, head_dim_S, head_dim_T]."""
        cross: Tensor = moment.cross.unflatten(1, (target.heads, -1)).unflatten(0, (source.heads, -1)).transpose(1, 2)
        return cross[pairing.query, torch.arange(target.heads)]

    # One map per kv head serves v's output and o's input: the context is a weighted mean of values, head by head.
    t_context = procrustes(of_group(paired(context)), null=recipe.null, floor=recipe.floor)
    e_context = energies((context.source_energy, context.target_energy), heads, pairing.query)
    # Where several target heads copy one source head they share its update, or it would be added as often.
    share, fit = torch.ones(2, target.heads, dtype=torch.float64)
    if recipe.heads == "pair" and len(set(pairing.query.tolist())) < target.heads:
        loud = context.source_energy.unflatten(0, (source.heads, -1)).sum(1).cpu()[pairing.query]
        known = t_context.map.cpu()[group], _ratios(e_context)[group], loud, p.grams[f"{b}.context"][1].cross
        share, fit = shares(pairing.query, paired(context), *known, floor=max(recipe.floor, FLOOR_DOUBLE))
    fit_kv = fit.unflatten(0, (target.kv_heads, -1)).amax(1)
    if alone:
        t_context = procrustes(leaning(of_group(paired(alone)), t_context.map), null=recipe.null, floor=recipe.floor)
        e_context = energies((alone.source_energy, alone.target_energy), heads, pairing.query)

    def by_query(polar: Polar, scale: Tensor, weight: Tensor) -> maps.Heads:
        return maps.Heads(pairing.query, blocks(polar, scale)[group] * weight[:, None, None], source.heads)

    def by_kv(polar: Polar, scale: Tensor) -> maps.Heads:
        return maps.Heads(pairing.kv, blocks(polar, scale * fit_kv), source.kv_heads)

    out.add(f"{b}.context", t_context, context.count, by_query(t_context, 1 / _ratios(e_context, recipe), share))

    # v writes what o reads, scaled by v's own energies.
    query, key, value = (p.energies.get(names[role][1]) for role in QKV)
    if value:
        e_value = energies((value.source, value.target), kv_heads, pairing.kv)
        out.put(f"{b}.value", by_kv(t_context, _ratios(e_value, recipe)))
    if query and key and f"{b}.attention" in p.moments:
        e_query = energies((query.source, query.target), heads, pairing.query)
        e_key = energies((key.source, key.target), kv_heads, pairing.kv)
        # Attention reads q and k only through q k^T, so they have one map: of both crosses, each as loud as the other.
        shared = sum(
            cross_of(role, counts, chosen) / _positive((e_s * e_t).sqrt())[:, None, None]
            for role, counts, chosen, (e_s, e_t) in (
                (QKV[0], heads, pairing.query, e_query),
                (QKV[1], kv_heads, pairing.kv, e_key),
            )
        )
        t_shared = procrustes(shared, null=recipe.null, floor=recipe.floor)  # type: ignore[arg-type]
        out.add(f"{b}.query", t_shared, context.count, by_query(t_shared, _ratios(e_query, recipe), fit))
        out.put(f"{b}.key", by_kv(t_shared, _ratios(e_key, recipe)))
    if recipe.heads == "dense":
        _dense_context(out, b, context, alone, value, names, recipe)


def shares(
    chosen: Tensor, cross: Tensor, t: Tensor, scale: Tensor, energy: Tensor, gram: Tensor, *, floor: float
) -> tuple[Tensor, Tensor]:
    """How target heads that copy one source head share its update: weights w at o's input, and fits at q, k and v.

    Of the source head's context x a head with context c_j says ``p_j = c_j T_j^T / s_j``. Weights are those of least
    squares, min |x - sum_j w_j p_j|^2 + rho |x|^2 sum_j (w_j s_best / s_j)^2, with rho the share of x that no weights
    explain: what stays unexplained is worth no large entries of o, which a quiet head would need. So equal copies get
    1 / copies, and a head that has nothing to do with x gets 0 beside one that says all of it. They are scaled until
    the sum is as loud as the best head alone, as a head without copies is; a fit is a head's weight beside the best's.

    Args:
        chosen: [heads_T], source head of each target head.
        cross: x_i^T c_j of the chosen pairs, [heads_T, head_dim_S, head_dim_T].
        t, scale: T_j [heads_T, head_dim_S, head_dim_T] and s_j [heads_T]. energy: |x_i|^2 of the chosen, [heads_T].
        gram: of the target's context with itself, [heads_T * head_dim_T, heads_T * head_dim_T].
        floor: share below which a weight is 0, and a difference between copies none.

    Returns:
        weights, and fits between 0 and 1, float64 [heads_T] on the CPU; 1 where a source head feeds one head alone.
    """
    share, fit = torch.ones(2, len(chosen), dtype=torch.float64)
    between = gram.unflatten(1, (len(chosen), -1)).unflatten(0, (len(chosen), -1)).transpose(1, 2)
    for same in ((chosen == own).nonzero()[:, 0] for own in chosen.unique()):
        if len(same) > 1 and energy[same[0]] > 0:
            b = (t[same] / scale[same, None, None]).to(gram)
            g = torch.einsum("jax,jkxy,kay->jk", b, between[same[:, None], same], b).cpu() / energy[same[0]]
            r = (cross[same].to(b) * b).sum((1, 2)).cpu() / energy[same[0]]
            share[same], fit[same] = _shared(g, r, scale[same], floor)
    return share, fit


def _shared(g: Tensor, r: Tensor, scale: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Of heads that copy one, :func:`shares` from g_jk = p_j p_k^T / |x|^2, r_j = x p_j^T / |x|^2 and s_j."""

    def least(penalty: Tensor) -> Tensor:
        """The smallest of the least squares; scaled so that a penalty far above the rest hides none of it."""
        k = (1 + penalty).rsqrt()
        penalised = k[:, None] * (g + g.T) / 2 * k + torch.diag(1 - k**2)
        found: Tensor = k * (torch.linalg.pinv(penalised, hermitian=True, rtol=floor) @ (k * r))
        return found

    w = least(torch.zeros_like(r))
    rest = (1 - w @ r).clamp(0, 1)
    for _ in r:  # the best head may be a louder one now, for which quiet ones are even less worth
        best = w.argmax()
        w = least(rest * (scale[best] / scale) ** 2)
    best = w.argmax()
    if not w[best] > 0:  # no head says anything of it
        return torch.full_like(w, 1 / len(w)), torch.ones_like(w)
    w = w * (g[best, best] / (w @ g @ w)).sqrt()
    w = torch.where(w.abs() > floor * w[best], w, 0.0)
    return w, (w / w[best]).clamp(0, 1)


def _dense_context(
    out: Ruleset,
    b: int,
    context: CrossMoment,
    alone: CrossMoment | None,
    value: Energy | None,
    names: Names,
    recipe: RecipeChoices,
) -> None:
    """One map and one scale for v's output and o's input, in place of those per head."""
    polar = procrustes(context.cross, null=recipe.null, floor=recipe.floor)
    if alone:
        context, polar = alone, procrustes(leaning(alone.cross, polar.map), null=recipe.null, floor=recipe.floor)
    out.add(f"{b}.context", polar, context.count)
    if (layer := names["output"][1]) in out.rules:
        read = scale_of(float(context.source_energy.sum()), float(context.target_energy.sum()), recipe)
        out.rules[layer] = replace(out.rules[layer], scale_in=read)
    if value:
        out.put(f"{b}.value", out.maps[f"{b}.context"])
    if value and (layer := names["value"][1]) in out.rules:
        written = scale_of(float(value.source.sum()), float(value.target.sum()), recipe)
        out.rules[layer] = replace(out.rules[layer], scale_out=written)


def scale_of(source: float, target: float, recipe: RecipeChoices | None = None) -> float:
    """sqrt(E_T / E_S) of two energies; 1 where a side has none (its map is then zero), or the recipe does not scale."""
    scales = recipe is None or recipe.scale != "none"
    return math.sqrt(target / source) if scales and source > 0 and target > 0 else 1.0


def _ratios(energies: tuple[Tensor, Tensor], recipe: RecipeChoices | None = None) -> Tensor:
    return torch.tensor(
        [scale_of(s, t, recipe) for s, t in zip(*(e.tolist() for e in energies), strict=True)], dtype=torch.float64
    )


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)
