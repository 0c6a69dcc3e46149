"""Symmetries: moves that change every parameter of a model and not its function.

A move is `(spec, seed) -> spec`. All its draws follow from the seed, so the same move of a base and of its tuned model
is the same re-parametrisation, and the moved tuned model is what an exact transport must compute.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .models import Draw, Spec, tune

Move = Callable[[Spec, int], Spec]
Arrangement = tuple[Sequence[int], Sequence[Sequence[int]]]  # source kv group, source query heads, per target group


@dataclass(frozen=True)
class Pair:
    name: str
    base: Callable[[], Spec]
    moves: tuple[Move, ...]
    deltas: tuple[str, ...] = ("linear", "gains", "everything", "lora")
    calibration: tuple[tuple[str, object], ...] = ()  # arguments of `batches`
    narrow: bool = False  # the moved model is the source: its delta lies inside the image of the smaller target

    def sides(self, kind: str) -> tuple[Spec, Spec, Spec, Spec]:
        """Source base, source tuned, target base, and the tuned target an exact transport must reach."""
        small = self.base()
        start, tuned = small, tune(small, kind)
        if not self.narrow:
            return start, tuned, move(start, self.moves), move(tuned, self.moves)
        own = (residual(),)  # the small side gets gains of its own
        return move(start, self.moves), move(tuned, self.moves), move(start, own), move(tuned, own)


def move(spec: Spec, moves: Sequence[Move]) -> Spec:
    for seed, step in enumerate(moves):
        spec = step(spec, 100 + seed)
    return spec


# --- the residual stream ----------------------------------------------------------------------------------------------


def mean_free(width: int) -> Tensor:
    """[width, width], the projector onto what LayerNorm sees."""
    return torch.eye(width, dtype=torch.float64) - 1 / width


def same(draw: Draw, spec: Spec) -> Tensor:
    return torch.eye(spec.config["hidden_size"], dtype=torch.float64)


def rotated(draw: Draw, spec: Spec) -> Tensor:
    return widened(spec.config["hidden_size"])(draw, spec)


def widened(width: int) -> Callable:
    def isometry(draw: Draw, spec: Spec) -> Tensor:
        old = spec.config["hidden_size"]
        if not spec.names.layer_norm:
            return draw.orthonormal_rows(old, width)
        basis = [torch.linalg.eigh(mean_free(d)).eigenvectors[:, 1:] for d in (old, width)]  # [d, d - 1]
        return basis[0] @ draw.orthonormal_rows(old - 1, width - 1) @ basis[1].T

    return isometry


def doubled(draw: Draw, spec: Spec) -> Tensor:
    """x -> [x, x], up to its scale."""
    return torch.cat([same(draw, spec)] * 2, dim=1) / 2**0.5


def signed_permutation(draw: Draw, spec: Spec) -> Tensor:
    width = spec.config["hidden_size"]
    sign = torch.ones(width, dtype=torch.float64) if spec.names.layer_norm else draw.normal(width).sign()
    return torch.diag(sign)[:, draw.order(width)]


def residual(isometry: Callable = same, scale: float = 1.0, *, carry_final: bool = False) -> Move:
    """x -> scale x P with P [dS, dT] orthonormal rows (LayerNorm: on the mean-free part, plus a random mean).

    Then z -> sqrt(dT / dS) z P. Every norm gets new random gains and biases, which its readers absorb, and readers get
    random weights where z has no component. `carry_final`: the final norm keeps its gain (tied head, no head), which P
    allows when it has one entry in each column.
    """

    def step(spec: Spec, seed: int) -> Spec:
        draw, names, state = Draw(seed), spec.names, dict(spec.state)
        p = whole = isometry(draw, spec)
        old, width = p.shape
        if names.layer_norm:
            p = mean_free(old) @ p @ mean_free(width)
        ratio, empty = (width / old) ** 0.5, torch.eye(width, dtype=torch.float64) - p.T @ p
        layers, readout = spec.config["num_hidden_layers"], spec.readout
        for norm, readers in names.readers(layers):
            gain, bias = state[f"{norm}.weight"], state.get(f"{norm}.bias")
            new_gain, new_bias = draw.gain(width), draw.bias(width) if names.layer_norm else None
            if not readers and carry_final:
                entries = (whole != 0).double()
                new_gain = gain @ entries / (scale * ratio if spec.tied else 1)
                new_bias = bias @ entries if names.layer_norm else None
            if not readers and not spec.tied:
                zeros = torch.zeros(1, dtype=torch.float64)
                back = torch.diag(1 / new_gain) @ (whole if carry_final else p).T @ torch.diag(gain) / ratio
                offset = (zeros if bias is None else bias) - (zeros if bias is None else new_bias @ back)
                readout = [back @ readout[0], offset @ readout[0] + readout[1]] if readout else [back, offset]
            for name in readers:
                folded = state[f"{name}.weight"] * gain
                weight = folded @ p / ratio + draw.normal(len(folded), width) @ empty / width**0.5
                if names.layer_norm:
                    shift = folded @ (bias / gain)
                    if f"{name}.bias" in state:
                        state[f"{name}.bias"] = state[f"{name}.bias"] + shift - weight @ (new_bias / new_gain)
                    else:  # z of a LayerNorm has no mean: weights along it change nothing but what the bias adds
                        zeta = new_bias / new_gain
                        weight = weight + ((shift - weight @ zeta) / zeta.sum())[:, None]
                state[f"{name}.weight"] = weight / new_gain
            state[f"{norm}.weight"] = new_gain
            if names.layer_norm:
                state[f"{norm}.bias"] = new_bias
        for name, axis in names.writers(layers):
            if name in state:
                moved = scale * state[name].movedim(axis, -1) @ p
                if names.layer_norm:
                    moved = moved + draw.normal(*moved.shape[:-1], 1)
                state[name] = moved.movedim(-1, axis).contiguous()
        sizes = {"hidden_size": width, names.epsilon: spec.config[names.epsilon] * scale**2 * old / width}
        return replace(spec, state=state, config=spec.config | sizes, readout=readout)

    return step


# --- neurons ----------------------------------------------------------------------------------------------------------


def neurons(arrange: Callable[[Draw, int], list[int]], silent: Sequence[str] = (), rescale: float = 1.0) -> Move:
    """Neuron j becomes a copy of neuron `arrange(..)[j]`; copies share the weights of the down projection unevenly.

    -1 is a new silent neuron, with zero rows in the layers named in `silent` and random weights elsewhere. `rescale`
    multiplies the last expanding layer (up) and divides down.
    """

    def step(spec: Spec, seed: int) -> Spec:
        draw, state = Draw(seed), dict(spec.state)
        for i in range(spec.config["num_hidden_layers"]):
            order = arrange(draw, spec.config["intermediate_size"])
            new, down = torch.tensor(order) < 0, f"{spec.names.contract.format(i)}.weight"
            for name in spec.names.expand:
                factor = rescale if name == spec.names.expand[-1] else 1.0
                for part in ("weight", "bias"):
                    key = f"{name.format(i)}.{part}"
                    if key in state:
                        rows = state[key][order] * factor
                        random = draw.normal(*rows.shape) / rows.shape[-1] ** 0.5
                        zero = name.rsplit(".", 1)[1] in silent
                        rows[new] = 0.0 if zero else random[new]
                        state[key] = rows
            columns = state[down][:, order] * draw.shares(order) / rescale
            random = draw.normal(*columns.shape) / columns.shape[1] ** 0.5
            columns[:, new] = random[:, new]
            state[down] = columns
        return replace(spec, state=state, config=spec.config | {"intermediate_size": len(order)})

    return step


def permuted_neurons(draw: Draw, count: int) -> list[int]:
    return draw.order(count)


def doubled_neurons(draw: Draw, count: int) -> list[int]:
    return [*range(count), *range(count)]


def with_extra(extra: int, kept: int = -1) -> Callable:
    """`extra` more neurons at random places: silent ones (-1), or copies of neuron `kept`, `kept + 1`, ..."""

    def arrange(draw: Draw, count: int) -> list[int]:
        order = [*range(count), *((kept + j if kept >= 0 else -1) for j in range(extra))]
        return [order[j] for j in draw.order(len(order))]

    return arrange


# --- attention heads --------------------------------------------------------------------------------------------------


def heads_in_place(draw: Draw, groups: int, members: int) -> Arrangement:
    return list(range(groups)), [list(range(members))] * groups


def heads_permuted(draw: Draw, groups: int, members: int) -> Arrangement:
    return draw.order(groups), [draw.order(members) for _ in range(groups)]


def one_group_copied(draw: Draw, groups: int, members: int) -> Arrangement:
    return [*range(groups), draw.order(groups)[0]], [list(range(members))] * (groups + 1)


def all_groups_copied(draw: Draw, groups: int, members: int) -> Arrangement:
    return [*range(groups), *range(groups)], [list(range(members))] * (2 * groups)


def one_query_copied(draw: Draw, groups: int, members: int) -> Arrangement:
    return list(range(groups)), [[*range(members), draw.order(members)[0]] for _ in range(groups)]


def kv_unshared(draw: Draw, groups: int, members: int) -> Arrangement:
    """Every query head gets a kv head of its own: grouped attention written as plain multi-head attention."""
    return [g for g in range(groups) for _ in range(members)], [[m] for _ in range(groups) for m in range(members)]


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
        draw, state, names = Draw(seed), dict(spec.state), spec.names
        groups, members, old = spec.heads
        new = size or old
        eye = torch.eye(old, new, dtype=torch.float64)
        for i in range(spec.config["num_hidden_layers"]):
            sources, queries = arrange(draw, groups, members)
            pairs = [(g, m) for g, inner in zip(sources, queries, strict=True) for m in inner]
            shares = draw.shares([g * members + m for g, m in pairs])
            turns = [turn_qk(draw, old, new) if turn_qk else eye for _ in sources]
            values = [draw.orthonormal_rows(old, new) if turn_vo else eye for _ in sources]
            scales = [(0.5 + 2 * draw.gain(1), 0.5 + 2 * draw.gain(1)) if scaled else (1.0, 1.0) for _ in sources]
            inner = len(queries[0])

            def rows(part: str, out: list[tuple[int, Tensor]], count: int, i: int = i) -> None:
                for key in (f"{names.attention.format(i)}{part}.{p}" for p in ("weight", "bias")):
                    if key in state:
                        blocks = state[key].unflatten(0, (count, old))  # [heads, head size, ..]
                        turned = [(blocks[h].movedim(0, -1) @ turn).movedim(-1, 0) for h, turn in out]
                        state[key] = torch.cat(turned).contiguous()

            grow = (new / old) ** 0.5
            q = [(g * members + m, turns[t // inner] * scales[t // inner][0] * grow) for t, (g, m) in enumerate(pairs)]
            rows("q_proj", q, groups * members)
            rows("k_proj", [(g, turns[t] / scales[t][0]) for t, g in enumerate(sources)], groups)
            rows("v_proj", [(g, values[t] * scales[t][1]) for t, g in enumerate(sources)], groups)
            key = f"{names.attention.format(i)}o_proj.weight"
            blocks, columns = state[key].unflatten(1, (groups * members, old)), []
            for t, (g, m) in enumerate(pairs):
                value = values[t // inner]
                unread = draw.normal(len(blocks), new) @ (torch.eye(new, dtype=torch.float64) - value.T @ value)
                own = shares[t] / scales[t // inner][1] * blocks[:, g * members + m] @ value
                columns.append(own + unread / new**0.5)
            state[key] = torch.cat(columns, dim=1)
        sizes = {"num_attention_heads": len(pairs), "head_dim": new}
        if "num_key_value_heads" in spec.config:
            sizes["num_key_value_heads"] = len(sources)
        frequencies = inv_freq(spec) if inv_freq else spec.inv_freq
        return replace(spec, state=state, config=spec.config | sizes, inv_freq=frequencies)

    return step
