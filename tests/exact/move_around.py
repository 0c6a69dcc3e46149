"""Moves of what is around the layers: more blocks, other biases, larger images, another family's checkpoint."""

from dataclasses import replace

import torch

from .families import Names
from .models import Draw, Move, Spec
from .move_residual import along_mean, norms, writers


def deeper(*places: int) -> Move:
    """Identity blocks, in front of the blocks at these places: random weights, but those that write are zero."""

    def step(spec: Spec, seed: int) -> Spec:
        draw, old, parts = Draw(seed), range(spec.layers), {}
        order = [b for i in [*old, spec.layers] for b in [*[-1] * places.count(i), i] if b < spec.layers]
        inside = [name.removeprefix("blocks.0.") for name in spec.parts if name.startswith("blocks.0.")]
        for i, b in enumerate(order):
            for name in inside:
                like = spec.parts[f"blocks.{max(b, 0)}.{name}"]
                random = draw.like(f"blocks.{name}", like.shape) * (name.split(".")[0] not in ("o", "down"))
                parts[f"blocks.{i}.{name}"] = like if b >= 0 else random
        parts |= {name: value for name, value in spec.parts.items() if not name.startswith("blocks.")}
        return replace(spec, parts=parts, config=spec.config | {"num_hidden_layers": len(order)})

    return step


def stored_as(names: Names, *, biases: str = "", **sizes) -> Move:
    """The same network in another family's checkpoint; `biases` are those the other family has and this one lacks."""

    def step(spec: Spec, seed: int) -> Spec:
        parts = dict(spec.parts)
        for name in [n for n in parts if n.startswith("blocks.") and n.split(".")[2] in biases.split()]:
            parts.setdefault(name.replace(".weight", ".bias"), torch.zeros(len(parts[name]), dtype=torch.float64))
        return replace(spec, names=names, parts=parts, config={**spec.config, **names.small, **sizes})

    return step


def without_bias(*layers: str) -> Move:
    """Readers of a LayerNorm with a bias lose their own: what the norm's bias reads along its mean takes its place."""

    def step(spec: Spec, seed: int) -> Spec:
        parts = dict(spec.parts)
        for norm, readers in norms(spec):
            zeta = parts[f"{norm}.bias"] / parts[f"{norm}.weight"]
            for name in [n for n in readers if n.split(".")[-1] in layers]:
                moved = along_mean(parts.pop(f"{name}.bias"), zeta) / parts[f"{norm}.weight"]
                parts[f"{name}.weight"] = parts[f"{name}.weight"] + moved
        return replace(spec, parts=parts, config=spec.config | {"qkv_bias": False})

    return step


def zoomed(factor: int) -> Move:
    """Images and patches `factor` times larger on each side; a patch is the mean over the repeated pixels."""

    def step(spec: Spec, seed: int) -> Spec:
        patch = spec.parts["patch.weight"].repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor**2
        larger = {key: spec.config[key] * factor for key in ("image_size", "patch_size")}
        return replace(spec, parts=spec.parts | {"patch.weight": patch}, config=spec.config | larger)

    return step


def with_registers(names: Names, count: int, *, small: float = 1e-6) -> Move:
    """Register tokens that nothing reads: they live in a residual direction u that no weight writes and no patch has.

    Every head needs an unused dimension (the last): there q is the constant `small`, and k is u's part of z times
    -4e3 / small, so that weights are exp(-1000) for a register and, to rounding, untouched for every other token.
    """

    def step(spec: Spec, seed: int) -> Spec:
        parts, (groups, members, size) = dict(spec.parts), spec.heads
        written = [torch.ones(1, spec.config["hidden_size"], dtype=torch.float64)]
        for name, axis, scale in writers(spec):
            rows = parts[name].movedim(axis, -1).reshape(-1, written[0].shape[1])
            written.append(rows * parts.get(scale, torch.ones(1)))
        singular, basis = torch.linalg.svd(torch.cat(written))[1:]
        unused = basis[int((singular > 1e-9 * singular[0]).sum()) :]  # the same for base and tuned
        assert len(unused), "every direction of the residual is written"
        u = torch.nn.functional.normalize(unused.T @ (unused @ Draw(seed).normal(len(basis))), dim=0)
        for i in range(spec.layers):
            gain, bias = (parts[f"blocks.{i}.norm1.{kind}"] for kind in ("weight", "bias"))
            last = torch.arange(1, groups * members + 1) * size - 1
            for part, weight, constant in (("q", 0 * u, small), ("k", -4e3 / small * u, 0.0)):
                for kind, value in (("weight", weight / gain), ("bias", constant - weight / gain @ bias)):
                    name = f"blocks.{i}.{part}.{kind}"
                    parts[name] = parts[name].index_copy(0, last, value.expand(len(last), *value.shape))
        parts["registers.weight"] = 5 * (1 + Draw(seed).gain(count))[:, None] * u
        return replace(spec, names=names, parts=parts, config=spec.config | {"num_register_tokens": count})

    return step


def untied(names: Names) -> Move:
    """The shared table written twice: the head is a tensor of its own and may go its own way."""

    def step(spec: Spec, seed: int) -> Spec:
        parts = spec.parts | {"head.weight": spec.parts["embed.weight"]}
        return replace(spec, names=names, parts=parts, config=spec.config | {"tie_word_embeddings": False})

    return step


def scales_folded(spec: Spec, seed: int) -> Spec:
    """The factors behind the writers multiplied into them, as a family without such factors keeps them."""
    parts = {name: value for name, value in spec.parts.items() if ".scale" not in name}
    for name, axis, scale in writers(spec):
        if scale in spec.parts:
            parts[name] = (parts[name].movedim(axis, -1) * spec.parts[scale]).movedim(-1, axis).contiguous()
    return replace(spec, parts=parts)
