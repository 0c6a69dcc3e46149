"""A method for libraries that move task vectors between state dicts: prepared once, applied to any number of deltas.

Options and results are those of merge-and-rebase's method ``theseus``: every layer's own input and output, of any
module with parameters, OpenCLIP's vision towers first of all. What it cannot move stays zero and is logged by name.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..alignment.align import align
from ..errors import InputRefused
from ..models.forward import in_evaluation
from ..models.open_attention import open_attention
from ..models.precision import in_float32
from ..recipes.recipe import Recipe
from ..updates.delta import Delta
from ..updates.transport import transport
from .feed import batches, encode
from .own import OwnMaps, place
from .taps import Refused, Taps

log = logging.getLogger(__name__)
Tensors = Mapping[str, Tensor]
Move = Callable[[Tensors, Tensors], dict[str, Tensor]]  # (source's delta, target's base) -> the target's delta
DATA_FREE = ("data_free", "weight", "weights", "weight_space")
DATA_FREE_REFUSED = (
    "covariance_mode data_free pairs eigenvectors of weights, whose signs nothing fixes: on a target that is an exact "
    "rotation of the source the result is as large as the update and unrelated to it; give data loaders and "
    "covariance_mode='activations'"
)


class Method(Protocol):
    """What the library keeps in its registry."""

    name: str

    def prepare(self, **options: Any) -> dict[str, Any]: ...

    def apply(self, prepared: Mapping[str, Any], **options: Any) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Options:
    """The library's options that decide the maps, and its defaults; ``recipe`` is ours.

    Attributes:
        device: where statistics are added up; cuda becomes cpu where there is none.
        seq_align: see :func:`theseus_transport.integrations.taps.paired`.
        center_acts, whiten_power, whiten_eps: of the recipe ``paper``.
        n_batches, num_batches: how many batches to take (two names), by default all.
        seed, batch_size: of the shuffle, where loaders have a dataset of known length.
        patch_qkv, split_qkv: whether q, k, v of a fused attention move apart (two names); else they stay.
    """

    device: str | torch.device = "cuda"
    seq_align: str = "interpolate2d"
    center_acts: bool = False
    covariance_mode: str = "activations"
    whiten_power: float = 0.0
    whiten_eps: float = 1e-6
    n_batches: int | None = None
    num_batches: int | None = None
    seed: int = 0
    batch_size: int | None = None
    patch_qkv: bool = True
    split_qkv: bool | None = None
    recipe: str | Recipe = "paper"

    @classmethod
    def among(cls, options: Mapping[str, Any]) -> Options:
        """Those that are known; others belong to other methods and are ignored."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})

    @property
    def data_free(self) -> bool:
        mode = str(self.covariance_mode).strip().lower().replace("-", "_")
        if mode not in (*DATA_FREE, "activation", "activations"):
            raise Refused(f"covariance_mode is {self.covariance_mode!r}; choose activations or data_free")
        return mode in DATA_FREE

    def chosen(self) -> Recipe:
        """The recipe with the library's options in it."""
        own = {"center": self.center_acts, "whiten_power": self.whiten_power, "whiten_eps": self.whiten_eps}
        try:
            return Recipe.named(self.recipe, **{k: type(getattr(Recipe(), k))(v) for k, v in own.items()})
        except InputRefused as error:
            raise Refused(str(error)) from error

    def where(self) -> torch.device:
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            log.warning("device is %s, but this torch sees no GPU: statistics are added up on the CPU", device)
            return torch.device("cpu")
        return device


@dataclass(frozen=True)
class DropIn:
    """Moves task vectors between two models' state dicts.

    Attributes:
        name: in the library's registry.
        official: the library's own method, where this one stands in its place; it gets the data-free requests.
    """

    name: str = "theseus_ext"
    official: Method | None = None

    def prepare(
        self,
        *,
        source_model: nn.Module,
        target_model: nn.Module,
        source_dataloader: Iterable[Any] | None = None,
        target_dataloader: Iterable[Any] | None = None,
        delta: Tensors | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Align two models on unlabelled batches of both loaders, whose samples correspond.

        Args:
            source_model, target_model: with ``.visual`` that part is aligned, else the whole; they stay where they are.
            delta: by its keys only: what will be moved. Without it every parameter gets its map.
            options: see :class:`Options`; unknown ones are ignored.

        Raises:
            Refused: options, loaders or activations do not fit; a data-free request without ``official``.
        """
        chosen = Options.among(options)
        if chosen.data_free:
            given = {"source_model": source_model, "target_model": target_model, "delta": delta, **options}
            loaders = {"source_dataloader": source_dataloader, "target_dataloader": target_dataloader}
            if self.official is None:
                raise Refused(DATA_FREE_REFUSED)
            warnings.warn(f"{DATA_FREE_REFUSED}. Handed to the library's own method.", stacklevel=2)
            return self.official.prepare(**given, **loaders)
        recipe = chosen.chosen()
        if source_dataloader is None or target_dataloader is None:
            raise Refused("source_dataloader and target_dataloader are both needed to align activations")
        scopes = _scope(source_model), _scope(target_model)
        count = chosen.num_batches if chosen.n_batches is None else chosen.n_batches
        pairs = batches(source_dataloader, target_dataloader, count=count, seed=chosen.seed, size=chosen.batch_size)
        if not recipe.solver.any_module:
            return {"move": _by_family(*scopes, pairs, recipe), "n_batches": count}
        wanted = {short: delta[full] for short, full in _keys(delta).items()} if delta else scopes[0].state_dict()
        with in_evaluation(source_model, target_model), in_float32(source_model, target_model), ExitStack() as stack:
            opened = set()
            if chosen.patch_qkv if chosen.split_qkv is None else chosen.split_qkv:
                opened = {name for scope in scopes for name in _open(stack, scope)}
            places = [place(name, tensor.ndim, opened) for name, tensor in wanted.items()]
            taps = Taps(
                (tap for found in places if found for tap in found.taps),
                seq_align=chosen.seq_align,
                whiten=recipe.whiten_power > 0,
                device=chosen.where(),
            )
            stack.enter_context(taps.watching(*scopes))
            seen = 0
            for own, other in pairs:
                taps.run(partial(encode, source_model, own), partial(encode, target_model, other))
                seen += 1
            if not seen:
                raise Refused("the data loaders hold no batch; a few unlabelled ones are needed")
            maps = OwnMaps.of(taps, scopes, recipe, opened)
        return {
            "move": maps.move,
            "activation_registry": {str(tap): moment for tap, moment in taps.moments.items()},
            "split_fused_qkv": bool(opened),
            "n_batches": seen,
        }

    def apply(
        self,
        prepared: Mapping[str, Any],
        *,
        target_base: Tensors,
        delta: Tensors,
        strict: bool = False,
        **options: Any,
    ) -> dict[str, Tensor]:
        """The target's delta: a tensor for every key of ``delta`` that ``target_base`` has, in its shape and dtype.

        With the recipe ``coherent`` also one for every other tensor that takes part of the update up: the layer that
        reads a changed norm, the bias beside a changed weight.

        Args:
            prepared: by :meth:`prepare`; target_base: state dict of the target; delta: task vector of the source.
            strict: refuse a key the target does not have (KeyError), or no key at all (ValueError).
        """
        if "move" not in prepared:
            if self.official is None:
                raise Refused(f"prepared holds {', '.join(prepared)}; give what prepare of this method returned")
            return self.official.apply(prepared, target_base=target_base, delta=delta, strict=strict, **options)
        within = {short: full for short, full in _keys(delta).items() if full in target_base}
        if strict and not within:
            raise Refused("no key of the delta is a key of the target; were the right state dicts given?")
        if strict and (absent := [key for key in delta if key not in target_base]):
            raise KeyError(f"{absent[0]} ({len(absent)} such) is in the delta, but the target has no such tensor")
        names = _keys(target_base) | within
        changes, base = ({s: own[full] for s, full in n.items()} for own, n in ((delta, within), (target_base, names)))
        moved = prepared["move"](changes, base)
        out = {key: torch.zeros_like(target_base[key]) for key in delta if key in target_base}
        for short, value in moved.items():
            if short in within or bool(value.any()):
                out[names[short]] = value.to(target_base[names[short]])
        log.info("%s moved %d of %d tensors", self.name, len(moved), len(out))
        return out

    def transport(
        self,
        *,
        target_base: Tensors,
        delta: Tensors,
        prepared: Mapping[str, Any] | None = None,
        source_model: nn.Module | None = None,
        target_model: nn.Module | None = None,
        strict: bool = False,
        **options: Any,
    ) -> dict[str, Tensor]:
        """:meth:`prepare`, unless ``prepared`` is given, and :meth:`apply`."""
        if prepared is None:
            if source_model is None or target_model is None:
                raise Refused("source_model and target_model are both needed, or prepared")
            own = {"target_base": target_base, "delta": delta, **options}
            prepared = self.prepare(source_model=source_model, target_model=target_model, **own)
        return self.apply(prepared, target_base=target_base, delta=delta, strict=strict, **options)


def _scope(model: nn.Module) -> nn.Module:
    """The part that is aligned."""
    visual = getattr(model, "visual", None)
    return visual if isinstance(visual, nn.Module) else model


def _keys(delta: Tensors) -> dict[str, str]:
    """Name within the scope -> key, of what lies in the scope: everything, unless some keys start with ``visual.``."""
    visual = {key.removeprefix("visual."): key for key in delta if key.startswith("visual.")}
    return visual or {key: key for key in delta}


def _open(stack: ExitStack, scope: nn.Module) -> Iterator[str]:
    """Make the fused attentions of OpenCLIP's blocks show their projections; their names."""
    blocks = getattr(getattr(scope, "transformer", None), "resblocks", None)
    if isinstance(blocks, nn.Module):
        before = {name for name, m in scope.named_modules() if isinstance(m, nn.MultiheadAttention)}
        stack.enter_context(open_attention(blocks))
        yield from before - {name for name, m in scope.named_modules() if isinstance(m, nn.MultiheadAttention)}


def _by_family(source: nn.Module, target: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], recipe: Recipe) -> Move:
    """By a recipe that knows families, as ``coherent``; opt-in."""
    key = "pixel_values"
    alignment = align(source, target, (({key: own}, {key: other}) for own, other in pairs), recipe=recipe)
    base = {name: tensor.detach().double().cpu() for name, tensor in source.state_dict().items()}

    def move(delta: Tensors, target: Tensors) -> dict[str, Tensor]:
        changes = {name: change.double().cpu() for name, change in delta.items() if name in base and bool(change.any())}
        if not changes:  # transport refuses an update of nothing
            return {}
        tuned = base | {name: base[name] + change for name, change in changes.items()}
        return dict(transport(alignment, Delta.between(base, tuned), target))

    return move
