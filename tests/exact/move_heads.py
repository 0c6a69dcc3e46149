"""Moves of attention heads: copied, permuted, turned, rescaled, of another size."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .models import Draw, Move, Spec

Arrangement = tuple[Sequence[int], Sequence[Sequence[int]]]  # source kv group, source query heads, per target group


def heads_in_place(draw: Draw, groups: int, members: int) -> Arrangement:
    return list(range(groups)), [list(range(members))] * groups


def heads_permuted(draw: Draw, groups: int, members: int) -> Arrangement:
    return draw.order(groups), [draw.order(members) for _ in range(groups)]


def one_group_copied(draw: Draw, groups: int, members: int) -> Arrangement:
    return [*range(groups), draw.order(groups)[0]], [list(range(members))] * (groups + 1)


def two_groups_copied(draw: Draw, groups: int, members: int) -> Arrangement:
    return [*range(groups), *draw.order(groups)[:2]], [list(range(members))] * (groups + 2)


def all_groups_copied(draw: Draw, groups: int, members: int) -> Arrangement:
    return [*range(groups), *range(groups)], [list(range(members))] * (2 * groups)


def one_query_copied(draw: Draw, groups: int, members: int) -> Arrangement:
    return list(range(groups)), [[*range(members), draw.order(members)[0]] for _ in range(groups)]


def kv_unshared(draw: Draw, groups: int, members: int) -> Arrangement:
    """Every query head gets a kv head of its own: grouped attention written as plain multi-head attention."""
    return [g for g in range(groups) for _ in range(members)], [[m] for _ in range(groups) for m in range(members)]


def dense(draw: Draw, old: int, new: int) -> Tensor:
    """Without a rotary embedding q and k share any [old, new] map with orthonormal rows."""
    return draw.orthonormal_rows(old, new)


def planar(draw: Draw, old: int, new: int, place: list[int] | None = None, *, signs: bool = False) -> Tensor:
    """[old, new]: rotary pair i (dimensions i and i + old / 2) turned in its plane, onto pair `place[i]`.

    `signs`: by half turns only, which a norm with gains between projection and rotation allows.
    """
    turn, angle = torch.zeros(old, new, dtype=torch.float64), 3 * draw.normal(old // 2)
    if signs:
        cos, sin = angle.sign(), torch.zeros_like(angle)
    else:
        cos, sin = angle.cos(), angle.sin()
    for i, j in enumerate(place or range(old // 2)):
        a, b, c, d = i, i + old // 2, j, j + new // 2
        turn[a, c], turn[a, d], turn[b, c], turn[b, d] = cos[i], sin[i], -sin[i], cos[i]
    return turn


def larger_rotary_heads(size: int, *, signs: bool = False) -> Move:
    """The rotary pairs keep their frequencies, at other places; new pairs between them get frequencies of their own."""

    def step(spec: Spec, seed: int) -> Spec:
        old = spec.heads[2]
        place = sorted(Draw(seed).order(size // 2)[: old // 2])

        def frequencies(spec: Spec) -> Tensor:
            kept = 1 / 10000.0 ** (torch.arange(0, old, 2).float() / old)  # rope_theta of the config
            found = torch.linspace(0.7, 0.05, size // 2)
            found[place] = kept if spec.inv_freq is None else spec.inv_freq
            return found

        turn = partial(planar, place=place, signs=signs)
        return heads(turn_qk=turn, size=size, turn_vo=True, inv_freq=frequencies)(spec, seed)

    return step


def heads(
    arrange: Callable[[Draw, int, int], Arrangement] = heads_in_place,
    turn_qk: Callable[[Draw, int, int], Tensor] | None = None,
    *,
    size: int | None = None,
    turn_vo: bool = False,
    scaled: bool = False,
    inv_freq: Callable[[Spec], Tensor] | None = None,
) -> Move:
    """Heads copied or permuted; inside each kv group q and k turned by one map, v and o by another, and rescaled.

    `size`: a larger head size. New directions are zero in q, k and v, random in o, and q grows by
    sqrt(size / old size), against the scaling of the scores.
    """

    def step(spec: Spec, seed: int) -> Spec:
        draw, parts = Draw(seed), dict(spec.parts)
        groups, members, old = spec.heads
        new = size or old
        eye = torch.eye(old, new, dtype=torch.float64)
        for i in range(spec.layers):
            sources, queries = arrange(draw, groups, members)
            pairs = [(g, m) for g, inner in zip(sources, queries, strict=True) for m in inner]
            shares = draw.shares([g * members + m for g, m in pairs])
            turns = [turn_qk(draw, old, new) if turn_qk else eye for _ in sources]
            values = [draw.orthonormal_rows(old, new) if turn_vo else eye for _ in sources]
            scales = [(0.5 + 2 * draw.gain(1), 0.5 + 2 * draw.gain(1)) if scaled else (1.0, 1.0) for _ in sources]
            inner = len(queries[0])

            def rows(part: str, out: list[tuple[int, Tensor]], count: int, i: int = i) -> None:
                for key in (f"blocks.{i}.{part}.{kind}" for kind in ("weight", "bias")):
                    if key in parts:
                        blocks = parts[key].unflatten(0, (count, old))  # [heads, head size, ..]
                        turned = [(blocks[h].movedim(0, -1) @ turn).movedim(-1, 0) for h, turn in out]
                        parts[key] = torch.cat(turned).contiguous()

            grow = (new / old) ** 0.5
            q = [(g * members + m, turns[t // inner] * scales[t // inner][0] * grow) for t, (g, m) in enumerate(pairs)]
            rows("q", q, groups * members)
            rows("k", [(g, turns[t] / scales[t][0]) for t, g in enumerate(sources)], groups)
            rows("v", [(g, values[t] * scales[t][1]) for t, g in enumerate(sources)], groups)
            key = f"blocks.{i}.o.weight"
            blocks, columns = parts[key].unflatten(1, (groups * members, old)), []
            for t, (g, m) in enumerate(pairs):
                value = values[t // inner]
                unread = draw.normal(len(blocks), new) @ (torch.eye(new, dtype=torch.float64) - value.T @ value)
                own = shares[t] / scales[t // inner][1] * blocks[:, g * members + m] @ value
                columns.append(own + unread / new**0.5)
            parts[key] = torch.cat(columns, dim=1)
            if f"blocks.{i}.q_norm.weight" in parts:
                parts.update(head_gains(draw, parts, f"blocks.{i}.", turns[0]))
        sizes = {"num_attention_heads": len(pairs), "head_dim": new}
        if "num_key_value_heads" in spec.config:
            sizes["num_key_value_heads"] = len(sources)
        frequencies = inv_freq(spec) if inv_freq else spec.inv_freq
        return replace(spec, parts=parts, config=spec.config | sizes, inv_freq=frequencies)

    return step


def beside_live(groups: int = 0, queries: int = 0, *, volume: float = 1.0) -> Move:
    """Heads of the model's own beside those that are there: whole groups, and query heads inside every group.

    All are random and read; they come in couples whose writes cancel. `volume`: of the new values.
    """

    def step(spec: Spec, seed: int) -> Spec:
        draw, parts = Draw(seed), dict(spec.parts)
        old, members, size = spec.heads
        inner = members + 2 * queries

        def random(key: str, *shape: int) -> Tensor:
            """[groups, heads, size, ...]: rows of that many heads."""
            rows = draw.like(key, torch.Size([shape[0] * shape[1] * shape[2], *shape[3:]]))
            return rows.unflatten(0, shape[:3])

        for i in range(spec.layers):
            for part, more, own in (("q", queries, inner), ("k", 0, 1), ("v", 0, 1)):
                for key in (f"blocks.{i}.{part}.{kind}" for kind in ("weight", "bias")):
                    if key in parts:
                        held = parts[key].unflatten(0, (old, -1, size))
                        extra = random(key, old, more, *held.shape[2:])
                        held = torch.cat([held, extra, extra], dim=1)
                        extra = random(key, groups, own, *held.shape[2:]) * (volume if part == "v" else 1)
                        parts[key] = torch.cat([held, extra, extra]).flatten(0, 2).contiguous()
            key = f"blocks.{i}.o.weight"
            held = parts[key].T.unflatten(0, (old, members, size))
            extra = random(key, old, queries, *held.shape[2:])
            held = torch.cat([held, extra, -extra], dim=1)
            extra = random(key, groups, inner, *held.shape[2:])
            parts[key] = torch.cat([held, extra, -extra]).flatten(0, 2).T.contiguous()
        sizes = {"num_attention_heads": (old + 2 * groups) * inner, "head_dim": size}
        if "num_key_value_heads" in spec.config:
            sizes["num_key_value_heads"] = old + 2 * groups
        return replace(spec, parts=parts, config=spec.config | sizes)

    return step


def head_gains(draw: Draw, parts: dict[str, Tensor], block: str, turn: Tensor) -> dict[str, Tensor]:
    """Gains [head size] of the norms behind q and k, which all heads share, where `turn` changes signs and places only.

    Each rotary pair moves a factor from one to the other; new directions, where q and k are zero, get any gain. The
    norms undo the growth of q, and both make the live directions sqrt(new / old) larger: scores lack sqrt(old / new).
    """
    old, new = turn.shape
    entries, factor = (turn != 0).double(), draw.gain(new // 2).repeat(2)  # dimensions j and j + new / 2 are one pair
    random = draw.gain(new) * (entries.sum(0) == 0)
    names = [f"{block}{part}_norm.weight" for part in "qk"]
    q, k = (parts[name] @ entries + random for name in names)
    return {names[0]: q * factor, names[1]: k / factor * (old / new) ** 0.5}
