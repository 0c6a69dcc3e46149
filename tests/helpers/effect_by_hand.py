"""The recipe `effect` by hand: whole models in memory, run again after every fit, as plainly as it can be said.

For families whose writers are linear modules without a factor behind them (layer scale), same tokens on both sides.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from theseus_transport.models.geometry import Geometry
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Choice = Callable[
    [Tensor, Tensor, bool], float | None
]  # of a ridge, from X, what is missing, and whether a bias is fitted
Point = tuple[int, str]  # block and writer whose output has just been added; (-1, "contract") is the first hidden state
WRITERS = "output", "contract"


@dataclass(frozen=True)
class Seen:
    """What one model shows of all rows, in float64: the residual at every write point, and what its writer read."""

    residual: dict[Point, Tensor]
    read: dict[Point, Tensor]


class Model:
    """A whole model, its modules by canonical name."""

    def __init__(self, module: nn.Module):
        self.module, self.geometry = module, Geometry.of(module.config)
        self.family = self.geometry.family
        assert not self.geometry.scaled, "a factor behind the writers is not handled here"
        self.own = {self.family.canonical(name): name for name, _ in module.named_modules()}

    def get(self, name: str, block: int | None = None) -> nn.Module:
        return self.module.get_submodule(self.own[name if block is None else self.geometry.block(block, name)])

    def writer(self, point: Point) -> nn.Module:
        return self.get(self.family.output if point[1] == "output" else self.family.contract, point[0])

    def next_norm(self, point: Point) -> nn.Module:
        """The norm that reads the residual next."""
        block, writer = point
        if writer == "output":
            return self.get(self.family.mlp_norm, block)
        last = block + 1 == self.geometry.depth
        return self.get(self.family.final_norm) if last else self.get(self.family.attention_norm, block + 1)

    def z(self, point: Point, x: Tensor) -> Tensor:
        """The output of that norm for the residual x, without gain and bias."""
        norm = self.next_norm(point)
        eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
        x = self.varied(x)
        return x / (x.square().mean(1, keepdim=True) + eps).sqrt()

    def varied(self, x: Tensor) -> Tensor:
        """The part of x [rows, width] that the norms see: LayerNorm sees no mean over features."""
        return x - x.mean(1, keepdim=True) if self.family.norm == "layer" else x

    @torch.no_grad()
    def run(self, batches: Sequence[Mapping[str, Tensor]]) -> Seen:
        residual, read, hooks = {}, {}, []
        mask: Tensor | None = None

        def keep(store: dict, point: Point, state: Tensor) -> None:
            rows = state.double().flatten(0, 1) if mask is None else state.double()[mask.bool()]
            store.setdefault(point, []).append(rows)

        def on_input(module: nn.Module, store: dict, point: Point) -> None:
            hooks.append(module.register_forward_pre_hook(lambda _, inputs: keep(store, point, inputs[0])))

        def on_output(module: nn.Module, point: Point) -> None:
            first = lambda out: out if isinstance(out, Tensor) else out[0]  # noqa: E731
            hooks.append(module.register_forward_hook(lambda _, inputs, out: keep(residual, point, first(out))))

        on_input(self.get(self.family.attention_norm, 0), residual, (-1, "contract"))
        for block in range(self.geometry.depth):
            on_input(self.get(self.family.mlp_norm, block), residual, (block, "output"))
            on_output(self.get(f"{self.family.blocks}.{block}"), (block, "contract"))
            for writer in WRITERS:
                on_input(self.writer((block, writer)), read, (block, writer))
        for batch in batches:
            mask = batch.get("attention_mask")
            self.module(**batch)
        for hook in hooks:
            hook.remove()
        return Seen(*({point: torch.cat(parts) for point, parts in store.items()} for store in (residual, read)))


def polar(cross: Tensor, floor: float) -> Tensor:
    """The partial polar factor of [dS, dT] on the directions above floor times the largest singular value."""
    u, s, vh = torch.linalg.svd(cross, full_matrices=False)
    kept = s > floor * s[0]
    return u[:, kept] @ vh[kept]


def cut(weight: Tensor, x: Tensor, rho: float, rank: int) -> Tensor:
    """The matrix of a rank nearest to W [out, in] in |x dW^T|^2 + rho tr(G) / d_in |dW|^2."""
    gram = x.T @ x
    gram.diagonal().add_(rho * gram.trace() / len(gram))
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.sqrt() @ vectors.T
    u, s, vh = torch.linalg.svd(root @ weight.T, full_matrices=False)
    return torch.linalg.solve(root, u[:, :rank] * s[:rank] @ vh[:rank]).T


def ridge(x: Tensor, missing: Tensor, rho: float, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """argmin |x W^T + 1 b^T - missing|^2 + rho tr(G) / d_in |W|^2: W [out, in] and b [out], or None without a bias."""
    mean_x, mean_m = (x.mean(0), missing.mean(0)) if bias else (0.0, 0.0)
    centred = x - mean_x
    gram = centred.T @ centred
    gram.diagonal().add_(rho * gram.trace() / len(gram))
    weight = torch.linalg.solve(gram, centred.T @ (missing - mean_m)).T
    return weight, mean_m - weight @ mean_x if bias else None


def effect_by_hand(
    source: nn.Module,
    tuned: nn.Module,
    target: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    prior_update: Mapping[str, Tensor] | None = None,
    writers: Sequence[str] = WRITERS,
    rho: float | Choice = 1e-2,
    bias: bool = True,
    blocks: Sequence[int | None] | None = None,
    floor: float | None = None,
    rank: int | None = None,
    tokens: int | None = None,
) -> dict[str, Tensor]:
    """The update of the target's writers, float64, by the target's own parameter names; the models stay as they are.

    Args:
        batches: keyword arguments of the forward pass; masked tokens are no rows.
        prior_update: parameter name -> what is added to the target before the pass. It is not in the result.
        writers: those that are fitted.
        rho: the ridge, in units of the mean eigenvalue of X^T X, or what chooses it, None for no update.
        bias: whether a bias is fitted where the target's writer has one.
        blocks: the source block that feeds each target block, or None; None alone: by position.
        rank: what every fit is cut to, before anything behind it is fitted.
        tokens: of a sample, where the heads read the first alone: behind the last block it is the only row.
        floor: of the maps; None is 1e-12 where both bases are in float64, and 1e-6 otherwise.
    """
    double = all(p.dtype == torch.float64 for m in (source, target) for p in m.parameters())
    floor = (1e-12 if double else 1e-6) if floor is None else floor
    s, t = Model(source), Model(target)
    moved = Model(copy.deepcopy(target).eval())
    add(moved.module, prior_update or {})
    at_s, at_tuned, at_t = s.run(batches), Model(tuned).run(batches), t.run(batches)

    def read(rows: Tensor, point: Point) -> Tensor:
        """Those that something behind reads."""
        return rows[::tokens] if tokens and point[0] + 1 == t.geometry.depth else rows

    def wanted(at: Point, point: Point) -> Tensor:
        """D [rows, dT] at a write point of the target, from the one of the source that it is paired with."""
        x_s, x_t = at_s.residual[at], at_t.residual[point]
        z_s, z_t = s.z(at, x_s), t.z(point, x_t)
        q = polar(z_s.T @ z_t, floor)
        if len(read(z_t, point)) < len(z_t):  # a map of these rows alone, which leans on that of all
            cross = read(z_s, point).T @ read(z_t, point)
            q = polar(cross + 1e-4 * cross.norm() * q, floor)
            x_s, x_t = read(x_s, point), read(x_t, point)
        ratio = (t.varied(x_t).square().sum() / s.varied(x_s).square().sum()).sqrt()
        return ratio * s.varied(read(at_tuned.residual[at], point) - x_s) @ q

    update, last = {}, wanted((-1, "contract"), (-1, "contract"))
    pairing = range(s.geometry.depth) if blocks is None else blocks
    assert len(pairing) == t.geometry.depth, f"{len(pairing)} of {t.geometry.depth} blocks of the target are told"
    for block, fed_by in enumerate(pairing):
        for writer in WRITERS:
            point = block, writer
            if fed_by is not None:
                last = wanted((fed_by, writer), point)
            if writer not in writers:
                continue
            now, layer = moved.run(batches), moved.writer(point)
            missing = last - t.varied(read(now.residual[point] - at_t.residual[point], point))
            inputs = read(now.read[point], point)
            fit_bias = bias and layer.bias is not None
            strength = rho if isinstance(rho, float) else rho(inputs, missing, fit_bias)
            if strength is None:
                continue
            weight, shift = ridge(inputs, missing, strength, bias=fit_bias)
            weight = cut(weight, inputs, strength, rank) if rank else weight
            name = next(name for name, module in moved.module.named_modules() if module is layer)
            fitted = {f"{name}.weight": weight.T if isinstance(layer, Conv1D) else weight}
            fitted |= {f"{name}.bias": shift} if fit_bias else {}
            add(moved.module, fitted)
            update |= fitted
    return update


@torch.no_grad()
def add(module: nn.Module, update: Mapping[str, Tensor]) -> None:
    """Add an update to a module's parameters, each in its own dtype."""
    for name, value in update.items():
        module.get_parameter(name).add_(value)
