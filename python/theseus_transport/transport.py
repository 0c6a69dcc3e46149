"""Alignment x delta -> the target's delta: which tensor gets which move, decided before any is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn

from .alignment import Alignment
from .delta import Delta, Factors, Renamed
from .errors import InputRefused
from .models import Base, Tensors, check_shapes, double
from .moves import move_dense, move_factors, move_gain, move_vector
from .recipes import Rule
from .spaces import Layer
from .update import Fate, Row, Update


def transport(
    alignment: Alignment,
    delta: Delta,
    target: nn.Module | Tensors,
    *,
    alpha: float = 1.0,
    leave: Sequence[str] = (),
) -> Update:
    """Move an update of the source to the target.

    Args:
        alignment: of the two bases.
        delta: the update, with the source base it belongs to.
        target: the target base.
        alpha: strength of the update.
        leave: glob patterns of canonical tensor names to leave behind.

    Raises:
        InputRefused: a changed tensor has no rule, nothing changed at all, or shapes do not fit the alignment.

    Source: arXiv 2602.12952 (the map of an update), and RECIPE fields of :class:`Recipe` for gains, biases and scales.
    """
    return _Planner(alignment, delta, target, alpha, leave).plan()


class _Planner:
    """Decides the fate of every tensor; the arithmetic is in the functions below."""

    def __init__(
        self, alignment: Alignment, delta: Delta, target: nn.Module | Tensors, alpha: float, leave: Sequence[str]
    ) -> None:
        self.alignment, self.delta, self.leave = alignment, delta, leave
        self.family = alignment.target.family
        self.source = Base.of(delta.base, alignment.source)
        self.target = Base.of(target, alignment.target)
        self.update = Update(self.target, delta, alpha)
        self.rows: dict[str, Row] = {}
        tuned = delta.tuned_tensors(self.family)
        self._untie(tuned)
        for name in [n for n in tuned.names if self._asked_to_leave(n)]:
            del tuned.names[name]  # as if the tuned model had not changed it
            self._row(name, "left", "left on request")
        self.tuned = tuned
        self.changed = {name for name in self.tuned if self._is_changed(name)}

    def _untie(self, tuned: Renamed) -> None:
        """A tied head is no tensor of its own, but an untied target's head takes its update."""
        if not self.source.layout.tied:
            return
        tuned.names.pop("lm_head.weight", None)
        if "lm_head.weight" in self.target and self.delta.adapter is None:
            for names in (self.source.names, tuned.names):
                if shared := names.get("embed_tokens.weight"):
                    names["lm_head.weight"] = shared

    def plan(self) -> Update:
        self._check_bases()
        for layer in self.alignment.target.layers():
            if layer.name in self.alignment.rules:
                self._plan_layer(layer, self.alignment.rules[layer.name])
        for name, rule in self.alignment.vectors.items():
            axis = self.family.embeddings.get(name, 0)
            self._plan_vector(name, partial(move_vector, self.alignment.maps[rule.output], rule, axis), axis)
        if "final" in self.alignment.maps and not self.alignment.vectors.keys() & {f"{self.family.final_norm}.weight"}:
            self._plan_unread_norm()
        self._plan_factors()
        self._settle()
        order = {name: i for i, name in enumerate(self.source.names)}
        self.update.coverage = sorted(
            self.rows.values(), key=lambda row: order.get(self.family.canonical(row.tensor), -1)
        )
        if not self.update._jobs:
            reasons = sorted({row.note for row in self.rows.values() if row.fate == "left"})
            what = (
                f"every changed tensor was left behind ({'; '.join(reasons)})"
                if reasons
                else "no tensor differs from the base"
            )
            raise InputRefused(f"nothing to transport: {what}; was the right base given?")
        return self.update

    def _is_changed(self, name: str) -> bool:
        before, after = self.source.get(name), self.tuned[name]
        if before is None:
            return True
        if before.shape != after.shape:
            if self._left(name):
                return True
            raise InputRefused(
                f"{name} is {list(after.shape)} in the tuned model and {list(before.shape)} in the base; "
                f"was the right base given? ({_leaving(name)})"
            )
        if before.dtype != after.dtype and not self.update.warnings:
            kinds = (str(t.dtype).removeprefix("torch.") for t in (after, before))
            self.update.warnings.append("the tuned model is {}, the base {}: their rounding moves along".format(*kinds))
        return not torch.equal(before.to(after), after)

    def _asked_to_leave(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.leave)

    def _left(self, name: str) -> str | None:
        """Why a tensor stays behind by rule."""
        if name in self.family.embeddings and name not in self.alignment.vectors:
            return f"the {self.alignment.recipe.name} recipe leaves embeddings"
        return next((why for pattern, why in self.family.left.items() if re.search(pattern, name)), None)

    def _check_bases(self) -> None:
        for side, base in (("source", self.source), ("target", self.target)):
            shapes = {name: base.shape(name) for name in base.names}
            says = f"the alignment's {side}"
            check_shapes(base.layout, shapes, says=says, cure="was the right base given?")
        if self.delta.tuned is not None:
            for name in self.source.names.keys() - self.tuned.names.keys() - self.rows.keys():
                if (
                    not self._left(name)
                    and not self._asked_to_leave(name)
                    and name.split(".")[0] not in self.family.heads
                ):
                    raise InputRefused(
                        f"the tuned model has no tensor {name}; is it complete, and is it a tune of the source?"
                    )

    def _row(self, name: str, fate: Fate, note: str = "") -> None:
        self.rows[name] = Row(name, fate, note)

    def _plan_layer(self, layer: Layer, rule: Rule) -> None:
        weight, own = f"{layer.name}.weight", {f"{layer.name}.{p}" for p in ("weight", "bias")}
        norm = {f"{layer.norm}.{p}" for p in ("weight", "bias")} & self.changed if rule.fold else set()
        if not (own | norm) & self.changed:
            return
        if reason := self._unfit(layer, weight):
            for name in own & self.changed:
                self._row(name, "left", reason)
            return
        if norm and self.delta.adapter is not None:
            raise InputRefused(
                f"the adapter saves {sorted(norm)[0]} whole; a moved adapter cannot carry a norm's change"
            )
        bias = f"{layer.name}.bias"
        takes_bias = bias in self.target or (self.family.norm == "layer" and rule.fold and layer.norm is not None)
        if bias in self.changed and not takes_bias:
            self._row(bias, "left", "the target has no bias to take it")
            if not ({weight} | norm) & self.changed:
                return
        moving = [n for n in sorted(own) if n in self.target and not self._asked_to_leave(n)]
        if not moving:
            return
        job = partial(self._dense, layer, rule)
        self.update._jobs |= {self.target.names[name]: job for name in moving}
        for name in (own & self.changed) - self.rows.keys():
            self._row(name, "transported")
        for name in norm:
            self._row(name, "folded", "into its readers")

    def _unfit(self, layer: Layer, weight: str) -> str | None:
        if why := self._left(weight):
            return why
        if weight not in self.source:
            tied = self.source.layout.tied and layer.role == "head"
            return "the source ties its head to the embedding" if tied else "the source base has no such tensor"
        if weight not in self.target:
            tied = self.target.layout.tied and layer.role == "head"
            return "the target ties its head to the embedding" if tied else "the target has no such tensor"
        rows = self.source.shape(weight)[0], self.target.shape(weight)[0]
        if layer.role == "head" and rows[0] != rows[1]:
            return f"the source has {rows[0]} outputs, the target {rows[1]}"
        return None

    def _dense(self, layer: Layer, rule: Rule) -> dict[str, Tensor]:
        moved = move_dense(layer, rule, self.alignment.maps, self.source, self.tuned, self.target, self.update.warnings)
        return {self.target.names[f"{layer.name}.{part}"]: value for part, value in moved.items()}

    def _plan_vector(self, name: str, move: Callable[[Tensor], Tensor], axis: int) -> None:
        if name not in self.changed:
            return
        if why := self._left(name):
            return self._row(name, "left", why)
        if name not in self.source or name not in self.target:
            side = "target" if name in self.source else "source base"
            return self._row(name, "left", f"the {side} has no such tensor")
        shapes = [list(base.shape(name)) for base in (self.source, self.target)]
        rest = [s[:axis] + s[axis + 1 :] for s in shapes]
        if rest[0] != rest[1]:
            return self._row(
                name, "left", f"the source's is {shapes[0]}, the target's {shapes[1]}: rows do not correspond"
            )

        def job() -> dict[str, Tensor]:
            return {self.target.names[name]: move(double(self.tuned[name]) - self.source.need(name))}

        self.update._jobs[self.target.names[name]] = job
        self._row(name, "transported")

    def _plan_unread_norm(self) -> None:
        """The final norm where no linear layer that moves reads it: a tied head, or no head at all."""
        norm = self.family.final_norm
        if not {f"{norm}.weight", f"{norm}.bias"} & (self.changed - self.rows.keys()):
            return
        scale = self.alignment.rules[self.family.heads[0]].scale_in
        gains = self.source.norm(norm, self.source.layout.width)[0], self.target.norm(norm, self.target.layout.width)[0]
        t = self.alignment.maps["final"](torch.eye(len(gains[0]), dtype=torch.float64))
        if self.family.norm == "layer":  # z has no mean, but a gain and a bias do: mean goes to mean
            t = t + 1 / math.sqrt(t.shape[0] * t.shape[1])
        self._plan_vector(f"{norm}.weight", partial(move_gain, t, *gains), 0)
        self._plan_vector(f"{norm}.bias", lambda d: gains[1] * scale * ((d / gains[0]) @ t), 0)

    def _plan_factors(self) -> None:
        adapter = self.delta.adapter
        if adapter is None:
            return
        layers = {layer.name: layer for layer in self.alignment.target.layers()}
        prefixed = any(name.startswith(f"{self.family.prefix}.") for name in self.target.tensors)
        for spelled in adapter.layers():
            name = self.family.canonical(spelled)
            if self._asked_to_leave(name) or self._asked_to_leave(f"{name}.weight"):
                self._row(name, "left", "left on request")
                continue
            rule = self.alignment.rules.get(name)
            if rule is None:
                raise InputRefused(f"the adapter changes {spelled}, which has no rule; {_leaving(name)}")
            if f"{name}.weight" in self.changed:
                raise InputRefused(f"the adapter both factors {spelled} and saves it whole")
            if reason := self._unfit(layers[name], f"{name}.weight"):
                self._row(name, "left", reason)
                continue
            factors, shape = adapter.factors(spelled), self.source.shape(f"{name}.weight")
            if (found := (factors.b.shape[0], factors.a.shape[1])) != shape:
                raise InputRefused(
                    f"the adapter's {spelled} is {list(found)}, the base's {list(shape)}; was the right base given?"
                )
            own = f"{self.family.prefix}.{name}" if prefixed and layers[name].role != "head" else name
            compute = partial(self._moved_factors, layers[name], rule, spelled)
            self.update._factors[own] = compute
            self.update._jobs[self.target.names[f"{name}.weight"]] = partial(self._product, name, compute)
            self._row(name, "transported", "as factors")

    def _moved_factors(self, layer: Layer, rule: Rule, spelled: str) -> Factors:
        assert self.delta.adapter is not None
        factors = self.delta.adapter.factors(spelled)
        return move_factors(layer, rule, self.alignment.maps, factors, self.source, self.target, self.update.warnings)

    def _product(self, name: str, compute: Callable[[], Factors]) -> dict[str, Tensor]:
        f = compute()
        return {self.target.names[f"{name}.weight"]: f.scaling * (f.b.double() @ f.a.double())}

    def _settle(self) -> None:
        """Every tensor has a fate; a changed one without a rule is an error."""
        norms = set(self.alignment.source.norms())
        for name in {**self.source.names, **dict.fromkeys(self.tuned)}:
            if name in self.rows or (self.delta.adapter is not None and name not in self.tuned):
                continue
            if name not in self.changed:
                self._row(name, "unchanged")
            elif why := self._left(name):
                self._row(name, "left", why)
            elif name.rpartition(".")[0] in norms:
                self._row(name, "left", "no layer that reads it moves")
            elif name.split(".")[0] in self.family.heads:
                self._row(
                    name,
                    "left",
                    "the source base has no such tensor"
                    if name not in self.source
                    else "the target has no such tensor",
                )
            else:
                raise InputRefused(f"{name} changed but has no rule; {_leaving(name)}")


def _leaving(name: str) -> str:
    """The option that leaves a tensor's layer behind, for messages."""
    return f"--leave '{name.removesuffix('.weight').removesuffix('.bias')}*' leaves it behind"
