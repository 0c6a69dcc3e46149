"""Where moves are computed: on a GPU with the CPU's results, and here on a device that has shapes and no numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact.families import GPT2
from exact.models import LLAMA, VIT, Spec, base, batches, tune
from test_presumed import CONFIG
from test_tiles import big
from theseus_transport import Alignment, Delta, InputRefused, Update, align, transport
from theseus_transport.jobs.prepared import Inputs
from theseus_transport.models import tensors as tensors_module
from theseus_transport.models.pair import Pair
from theseus_transport.models.tensors import CPU
from theseus_transport.recipes.maps import Dense, Factored, Heads, Identity, Map, on
from theseus_transport.updates.adapter import PREFIX
from theseus_transport.updates.alpha import matched
from theseus_transport.updates.layer_moves import move_bytes
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = dict(rtol=1e-12, atol=1e-12)  # float64, sums of 44 products in another order
META = torch.device("meta")
NAMES = {"llama": LLAMA, "gpt2": GPT2, "vit": VIT}
LAYERS = {
    "llama": ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn",),
}


def sides(name: str) -> tuple[Spec, Spec]:
    return base(NAMES[name]), base(NAMES[name], seed=5, width=36)


def aligned(name: str, recipe: str = "coherent") -> Alignment:
    """On the CPU, as every map of a run with maps made there."""
    source, target = sides(name)
    data = [tuple(batches(spec, seed=3, count=1, shape=(8, 16))[0] for spec in (source, target))]
    return align(source.build(), target.build(), data if name == "vit" else [data[0][0]], recipe=recipe)


def adapter(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw, found = torch.Generator().manual_seed(1), {}
    for layer in LAYERS[name]:
        shape = sides(name)[0].state[f"{layer}.weight"].shape
        out, width = reversed(shape) if name == "gpt2" else shape
        for part, size in {"A": (2, width), "B": (out, 2)}.items():
            found[f"{PREFIX}{layer}.lora_{part}.weight"] = torch.randn(*size, dtype=torch.float64, generator=draw).to(
                dtype
            )
    return found


def moved(
    name: str, kind: str, dtype: torch.dtype = torch.float64, *, recipe: str = "coherent", **options: Any
) -> Update:
    """An update of every tensor or of factors, between bases in ``dtype``."""

    def cast(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: v.to(dtype) for n, v in tensors.items()}

    source, target = sides(name)
    own = cast(source.state)
    if kind == "factors":
        delta = Delta.from_lora({**CONFIG, "target_modules": ["x"]}, adapter(name, dtype), own)
    else:
        delta = Delta.between(own, cast(tune(source, "everything").state))
    return transport(aligned(name, recipe), delta, cast(target.state), alpha=0.7, **options)


# --- the same update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1 << 20, 8 * 36 * 7], ids=["whole", "tiles"])
@pytest.mark.parametrize(
    "name, kind", [("llama", "full"), ("gpt2", "full"), ("vit", "full"), ("llama", "factors"), ("gpt2", "factors")]
)
def test_moves_agree_on_every_device(
    name: str, kind: str, tile: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors_module, "TILE", tile)
    update, expected = moved(name, kind, device=device), moved(name, kind)
    assert update.source.device.type == update.target.device.type == device and expected.source.device == CPU
    assert update.keys() == expected.keys() and len(update) >= len(LAYERS.get(name, ()))
    for layer, value in update.items():
        assert value.device == CPU and value.dtype == torch.float64
        torch.testing.assert_close(value, expected[layer], **ROUNDING)
    for layer, factors in update.factors.items():
        found, known = factors.compute(), expected.factors[layer].compute()
        for part in ("a", "b"):
            torch.testing.assert_close(getattr(found, part), getattr(known, part), **ROUNDING)
    assert update.warnings == expected.warnings
    assert matched(update) == pytest.approx(matched(expected), rel=1e-12)


def test_moves_follow_the_target(device: str) -> None:
    """Models on a GPU: maps are made and moves computed there, values handed out on the CPU."""
    source, target = sides("llama")
    bases = source.build(torch.float32).to(device), target.build(torch.float32).to(device)
    tuned = source.build(torch.float32)
    tuned.load_state_dict(tune(source, "everything").state)
    alignment = align(*bases, [{n: v.to(device) for n, v in batches(source, seed=3, count=1)[0].items()}])
    update = transport(alignment, Delta.between(bases[0], tuned), bases[1])
    elsewhere = transport(alignment, Delta.between(bases[0], tuned), bases[1], device="cpu")
    assert update.source.device.type == update.target.device.type == device and elsewhere.source.device == CPU
    before = {n: p.detach().clone() for n, p in bases[1].named_parameters()}
    values = dict(update)
    assert all(value.device == CPU for value in values.values())
    for name, value in elsewhere.items():  # both rounded to float32 once
        torch.testing.assert_close(values[name], value, rtol=2**-23, atol=1e-12)
    update.add_to(bases[1])
    for name, parameter in bases[1].named_parameters():
        change = values.get(name, torch.zeros(()))
        assert parameter.device.type == device and torch.equal(parameter, before[name] + change.to(device))


def test_where_a_target_lies() -> None:
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    some = {"a": torch.ones(1), "b": torch.ones(1, device="meta")}
    assert tensors_module.device_of(some) == CPU  # a module whose weights were offloaded
    assert tensors_module.device_of({**some, "c": on_gpu}) == torch.device("cuda", 1)  # type: ignore[dict-item]
    disk = type("Disk", (dict,), {"shapes": {}})(c=on_gpu)
    assert tensors_module.device_of(disk) == CPU  # what is read from a file lies on the CPU
    assert tensors_module.device_of(nn.Linear(1, 1).state_dict()) == CPU


def test_a_gpu_that_is_not_there_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputRefused, match="device is cuda:1, but this torch sees no GPU; give cpu, or leave it out"):
        moved("llama", "factors", device="cuda:1")


def test_a_job_moves_on_its_device() -> None:
    source, target = sides("llama")
    tuned = Delta.between(source.state, tune(source, "everything").state)
    asked = SimpleNamespace(device="meta", leave=(), rank=None, only_targeted=False)
    bases = SimpleNamespace(windows=Pair(source.state, target.state))
    inputs = SimpleNamespace(job=asked, delta=tuned, bases=bases, one_tokenizer=False, kind="checkpoint")
    update = Inputs.transport(inputs, aligned("llama"))  # type: ignore[arg-type]
    assert update.source.device == update.target.device == META


# --- a device without numbers ----------------------------------------------------------------------------------------


class OnlyThere(TorchDispatchMode):
    """Meta tensors as those of a second device: what is computed in float64 is there, and copies out of it hold ones.

    Attributes:
        computed: operations there; peak: bytes there that were alive at once, at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.computed, self.peak, self._alive = 0, 0, dict[int, tuple[StorageWeakRef, int]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, tensors = torch.ops.aten, _tensors([*args, *(kwargs or {}).values()])
        there = [t for t in tensors if t.is_meta]
        self.computed += bool(there)
        if func is aten._local_scalar_dense.default and there:
            return args[0].dtype != torch.bool
        if func is aten.copy_.default and there and not args[0].is_meta:
            assert args[0].dtype == args[1].dtype, "converted on the CPU"
            return args[0].fill_(1)
        if func not in (aten.copy_.default, aten._to_copy.default):
            places = {t.device for t in tensors if t.ndim}
            assert len(places) <= 1, f"{func} of tensors on {places}"
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors}
        for made in _tensors([out]):
            storage = made.untyped_storage()
            if made.is_meta:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            assert made.is_meta or made.dtype != torch.float64 or not made.ndim or storage._cdata in given, func
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    flat = [x for value in values for x in (value if isinstance(value, (list, tuple)) else (value,))]
    return [x for x in flat if isinstance(x, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name, kind, recipe",
    [
        ("llama", "full", "coherent"),
        ("gpt2", "full", "coherent"),
        ("vit", "full", "coherent"),
        ("vit", "full", "paper"),
        ("llama", "without-head", "coherent"),
        ("llama", "factors", "coherent"),
        ("gpt2", "factors", "coherent"),
    ],
)
def test_nothing_is_computed_elsewhere(name: str, kind: str, recipe: str, dtype: torch.dtype) -> None:
    leave = ["lm_head*"] if kind == "without-head" else []  # the final norm's gain then moves by itself
    update = moved(name, kind, dtype, recipe=recipe, device="meta", leave=leave)
    with OnlyThere() as seen:
        values = dict(update)
    assert seen.computed > 10 * len(values) and len(values) >= len(LAYERS.get(name, ()))
    for value in values.values():  # handed out on the CPU, every row of it copied out of the device
        assert value.device == CPU and value.dtype == torch.float32 and bool((value == 1).all())


@pytest.mark.parametrize("narrower", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_device_holds_what_is_predicted(norm: str, narrower: bool) -> None:
    """The prediction, one weight as it is stored, and one map; 1.1 is what a plan allows."""
    for move, tuned in big(norm, narrower=narrower):
        own, into = f"{move.own.name}.weight", f"{move.into.name}.weight"
        maps = [move.available.maps[name] for name in (move.rule.input, move.rule.output)]
        beside = max(sum(part.nbytes for part in t.tensors().values()) for t in maps)
        beside += move.source.tensors[move.source.slots[own].stored].nbytes
        predicted = move_bytes(move.source.shape(own), move.target.shape(into))
        there = replace(move, source=replace(move.source, device=META), target=replace(move.target, device=META))
        with OnlyThere() as seen:
            there.dense(tuned)
        assert 0.5 * predicted < seen.peak <= 1.1 * (predicted + beside), move.into.name


@pytest.mark.parametrize(
    "t",
    [
        Identity(),
        Dense(torch.ones(2, 3, dtype=torch.float64)),
        Factored(torch.ones(2, 1), torch.ones(1, 3)),
        Heads(torch.tensor([1, 0]), torch.ones(2, 1, 2), 2),
    ],
    ids=lambda t: type(t).__name__,
)
def test_a_map_elsewhere(t: Map) -> None:
    """Its numbers move, indices stay with the host that reads them; one that is there already is not copied."""
    assert on(t, CPU) is t
    there = on(t, META)
    assert type(there) is type(t) and all(x.is_meta == x.is_floating_point() for x in there.tensors().values())
    assert there(torch.ones(4, 2, device=META)).shape == t(torch.ones(4, 2)).shape
