"""Moves of the residual stream: turned, widened, rescaled, under norms with new gains."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .models import EMBEDDINGS, Draw, Move, Spec


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

    Then z -> sqrt(dT / dS) z P. Every norm gets new random gains and biases, which its readers absorb; every factor
    behind a writer is new, which the writer absorbs; readers get random weights where z has no component.
    `carry_final`: the final norm keeps its gain (tied head, no head), which P allows when it has one entry in each
    column. A norm in front of the first block needs the same of P, or a constant gain.
    """

    def step(spec: Spec, seed: int) -> Spec:
        draw, parts, layer_norm = Draw(seed), dict(spec.parts), spec.names.layer_norm
        p = whole = isometry(draw, spec)
        old, width = p.shape
        if layer_norm:
            p = mean_free(old) @ p @ mean_free(width)
        ratio, empty = (width / old) ** 0.5, torch.eye(width, dtype=torch.float64) - p.T @ p
        entries, readout = (whole != 0).double(), spec.readout
        for norm, readers in norms(spec):
            gain, bias = parts[f"{norm}.weight"], parts.get(f"{norm}.bias")
            new_gain, new_bias = draw.gain(width), draw.bias(width) if layer_norm else None
            if not readers and carry_final:
                back_to = scale * ratio if spec.tied else 1
                new_gain = gain @ entries / back_to
                new_bias = bias @ entries / back_to if layer_norm else None
            if not readers and not spec.tied:
                zeros = torch.zeros(1, dtype=torch.float64)
                back = torch.diag(1 / new_gain) @ (whole if carry_final else p).T @ torch.diag(gain) / ratio
                offset = (zeros if bias is None else bias) - (zeros if bias is None else new_bias @ back)
                readout = [back @ readout[0], offset @ readout[0] + readout[1]] if readout else [back, offset]
            for name in readers:
                folded = parts[f"{name}.weight"] * gain
                weight = folded @ p / ratio + draw.normal(len(folded), width) @ empty / width**0.5
                if layer_norm:
                    shift = folded @ (bias / gain)
                    if f"{name}.bias" in parts:
                        parts[f"{name}.bias"] = parts[f"{name}.bias"] + shift - weight @ (new_bias / new_gain)
                    else:
                        weight = weight + along_mean(shift - weight @ (new_bias / new_gain), new_bias / new_gain)
                parts[f"{name}.weight"] = weight / new_gain
            parts[f"{norm}.weight"] = new_gain
            if layer_norm:
                parts[f"{norm}.bias"] = new_bias
        scales = {name: draw.like(name, (width,)) for name in parts if ".scale" in name}
        for name, axis, scaled_by in writers(spec):
            value = parts[name].movedim(axis, -1) * parts.get(scaled_by, 1.0)
            tied = spec.tied and name == "embed.weight"
            moved = scale * value @ (whole if tied else p)
            if layer_norm and not tied:
                moved = moved + draw.normal(*moved.shape[:-1], 1)
            parts[name] = (moved / scales.get(scaled_by, 1.0)).movedim(-1, axis).contiguous()
        parts |= scales
        if "pre_norm.weight" in parts:
            gain = parts["pre_norm.weight"]
            constant = bool((gain == gain[0]).all())
            parts["pre_norm.weight"] = (gain[0].expand(width) if constant else gain @ entries) * scale / ratio
            parts["pre_norm.bias"] = scale * parts["pre_norm.bias"] @ whole + draw.normal(1)
        sizes = {"hidden_size": width, "eps": spec.config["eps"] * scale**2 * old / width}
        return replace(spec, parts=parts, config=spec.config | sizes, readout=readout)

    return step


def norms(spec: Spec) -> list[tuple[str, list[str]]]:
    """Every norm with the linear layers that read it."""
    reads = ("norm1", ("q", "k", "v")), ("norm2", ("gate", "up"))
    inside = [(f"blocks.{i}.", norm, parts) for i in range(spec.layers) for norm, parts in reads]
    every = [*inside, ("", "final_norm", ("head", "head_patches"))]
    return [(own + norm, [own + p for p in parts if f"{own}{p}.weight" in spec.parts]) for own, norm, parts in every]


def writers(spec: Spec) -> list[tuple[str, int, str]]:
    """What writes the residual: name, axis of the residual, and the layer scale behind it."""
    inside = [(f"blocks.{i}.", w, s) for i in range(spec.layers) for w, s in (("o", "scale1"), ("down", "scale2"))]
    linear = [(f"{own}{w}.{kind}", 0, f"{own}{s}.weight") for own, w, s in inside for kind in ("weight", "bias")]
    return [w for w in [*((name, axis, "") for name, axis in EMBEDDINGS.items()), *linear] if w[0] in spec.parts]


def along_mean(shift: Tensor, zeta: Tensor) -> Tensor:
    """A bias [out] as weights [out, width]: z of a LayerNorm has no mean, so all they read is its bias / gain."""
    return (shift / zeta.sum())[:, None].expand(-1, len(zeta))
