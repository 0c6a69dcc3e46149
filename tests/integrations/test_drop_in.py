"""The drop-in method against outputs of the official code, and against plain hooks and SVDs on other modules."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.openclip_tower import Tower, randomised
from test_parity import AMPLIFIED, CASES, case, determined, difference, reference_map, stored
from theseus_transport.integrations.drop_in import DropIn
from theseus_transport.integrations.taps import paired
from torch import Tensor, nn

STAY = ("class_embedding", "positional_embedding", "conv1.weight")
FORWARD = 1e-6  # float32 forward passes on two machines; about 3e-7 was seen
ROUNDED = 1e-6  # float64 all along but for maps, kept in float32: 6e-8, of results that maps of rank 1 leave small


def moved(source: nn.Module, target: nn.Module, loaders: Any, delta: Mapping[str, Tensor], **options: Any) -> Any:
    """What the method returns; ``loaders`` for both models, or a pair."""
    own, other = loaders if isinstance(loaders, tuple) else (loaders, loaders)
    given = {"source_base": source.state_dict(), "target_base": target.state_dict(), "delta": delta, "device": "cpu"}
    models = {"source_model": source, "target_model": target, "source_dataloader": own, "target_dataloader": other}
    return DropIn().transport(**{**given, **models, **options})


def delta_of(model: nn.Module, seed: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.01 * torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}


# --- outputs of the official code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_official_outputs_from_images(name: str) -> None:
    tensors, facts = case(name)
    models = [stored(name, side) for side in ("source", "target")]
    images = [tensors[f"images/{side}"] for side in ("source", "target")]
    for model, own, side in zip(models, images, ("source", "target"), strict=True):
        with torch.no_grad():
            seen, expected = model.encode_image(own), tensors[f"activations/{side}/root.out"]
        assert float((seen - expected).norm() / expected.norm()) <= FORWARD
    delta, expected = (
        {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(g)} for g in ("delta", "expected")
    )
    found = moved(*models, ([images[0]], [images[1]]), delta, strict=True, **facts["options"])
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {k: (t.shape, t.dtype) for k, t in expected.items()}
    for key in expected:
        for part, kept in determined(name, key.removeprefix("visual.")):
            ours, theirs = (t.chunk(3)[part] if "in_proj" in key else t for t in (found[key], expected[key]))
            assert difference(ours.double(), theirs.double(), *kept) <= AMPLIFIED, key
        if key.removeprefix("visual.") in STAY:
            assert not found[key].any() and not expected[key].any()


# --- other towers, against plain hooks and SVDs ----------------------------------------------------------------------


class Split(nn.Module):
    """Attention whose projections are modules of their own, with the weights of a fused one."""

    def __init__(self, fused: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, width = fused.num_heads, fused.embed_dim
        for name, weight, bias in zip("qkv", fused.in_proj_weight.chunk(3), fused.in_proj_bias.chunk(3), strict=True):
            layer = nn.Linear(width, width)
            layer.weight.data, layer.bias.data = weight.detach().clone(), bias.detach().clone()
            self.add_module(f"{name}_proj", layer)
        self.out_proj = nn.Linear(width, width)
        self.out_proj.load_state_dict(fused.out_proj.state_dict())

    def forward(self, x: Tensor, *_: Tensor, need_weights: bool = False) -> tuple[Tensor]:
        q, k, v = (getattr(self, f"{n}_proj")(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
        shares = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return (self.out_proj((shares @ v).transpose(1, 2).flatten(-2)),)


def split(tower: Tower) -> Tower:
    other = Tower(**tower.sizes).double()
    other.load_state_dict(tower.state_dict())
    for block in other.transformer.resblocks:
        block.attn = Split(block.attn)
    return other.double().eval()


def unfused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, tensor in tensors.items():
        parts = tensor.chunk(3) if "in_proj_" in name else [tensor]
        for letter, part in zip("qkv", parts, strict=False):
            out[name.replace("in_proj_", f"{letter}_proj.")] = part
    return out


def activations(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every module reads and writes, [samples, tokens, width], through hooks of the test's own."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def observe(module: nn.Module, args: Any, result: Any) -> None:
            for side, x in (("in", args[0]), ("out", result)):
                if isinstance(x, Tensor) and x.ndim < 4:
                    seen[f"{name}.{side}"] = x.double() if x.ndim == 3 else x[:, None].double()

        return observe

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules()]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


TOWERS = {
    "wider": (dict(width=16, image=32), dict(width=24, image=40)),
    "narrower, fewer heads": (dict(width=24, image=32, heads=4), dict(width=16, image=32, heads=2)),
    "layer scales": (dict(width=16, image=32, scaled=True), dict(width=20, image=32, scaled=True)),
    "flat MLP, other output": (dict(width=16, image=24, ratio=1), dict(width=24, image=32, ratio=1, output_dim=12)),
    "one expands, one does not": (dict(width=16, image=32, ratio=2), dict(width=24, image=32, ratio=1)),
    "deeper target": (dict(width=16, image=32, layers=1), dict(width=24, image=32, layers=2)),
}
IMAGES = 24


def pair(name: str) -> tuple[list[Tower], list[Tensor]]:
    towers = [randomised(Tower(**sizes), seed).double().eval() for seed, sizes in enumerate(TOWERS[name])]
    generator = torch.Generator().manual_seed(7)
    return towers, [torch.randn(IMAGES, 3, *(t.sizes["image"],) * 2, generator=generator).double() for t in towers]


def reference(source: Tower, target: Tower, images: list[Tensor], seq_align: str, center: bool) -> dict[str, Tensor]:
    """Cross-moment of every tap that both towers have, in float64."""
    seen = [activations(tower, own) for tower, own in zip((source, target), images, strict=True)]
    out = {}
    for tap in seen[0].keys() & seen[1].keys():
        s, t, mixing = paired(seen[0][tap], seen[1][tap], seq_align)
        s = s if mixing is None else mixing(s)
        s, t = (x - x.mean(0) if center else x for x in (s, t))
        out[tap] = s.T @ t
    return out


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(("seq_align", "center"), [("interpolate2d", False), ("interpolate", True), ("cls", False)])
def test_towers_against_hooks_and_svds(name: str, seq_align: str, center: bool) -> None:
    (source, target), images = pair(name)
    delta = delta_of(source)
    options = {"seq_align": seq_align, "center_acts": center}
    found = moved(source, target, ([images[0]], [images[1]]), delta, **options)
    assert list(found) == [key for key in delta if key in target.state_dict()]
    crosses = reference(split(source), split(target), images, seq_align, center)
    ours, base = unfused(found), unfused(target.state_dict())
    for key, change in unfused({key: delta[key] for key in found}).items():
        assert ours[key].shape == base[key].shape
        module = key.rpartition(".")[0]
        taps = ("ln_post.out", ".out") if key == "proj" else (f"{module}.out", f"{module}.in")
        maps = [reference_map(crosses[tap]) for tap in taps[: change.ndim] if tap in crosses and key not in STAY]
        if not maps:
            assert not ours[key].any() and key in STAY
            continue
        expected = change.double()
        for axis, t in enumerate(maps):
            expected = torch.tensordot(expected, t, dims=([axis], [0])).movedim(-1, axis)
        assert difference(ours[key].double(), expected, *maps) <= ROUNDED, key
        assert float(ours[key].norm()) > 0


def test_fused_attention_equals_split_and_is_put_back() -> None:
    (source, target), images = pair("wider")
    delta = delta_of(source)
    before = [dict(tower.named_modules()) for tower in (source, target)]
    training = source.train().training
    fused = unfused(moved(source, target, ([images[0]], [images[1]]), delta))
    assert [dict(tower.named_modules()) for tower in (source, target)] == before
    assert source.training is training and not target.training and not source.conv1._forward_hooks
    apart = moved(split(source), split(target), ([images[0]], [images[1]]), unfused(delta))
    assert fused.keys() == apart.keys()
    for key in fused:
        assert difference(fused[key], apart[key]) <= ROUNDED if key not in STAY else torch.equal(fused[key], apart[key])


def test_shapes_that_do_not_fit_stay(caplog: pytest.LogCaptureFixture) -> None:
    (source, target), images = pair("wider")
    delta, fused = delta_of(source), "transformer.resblocks.0.attn.in_proj_bias"
    wrong = {
        "ln_pre.weight": torch.ones(3),
        "ln_post.bias": torch.ones(16, 16),
        fused: torch.ones(2),
        "proj": torch.ones(3, 24),
    }
    found = moved(source, target, ([images[0]], [images[1]]), delta | wrong)
    assert {key for key, value in found.items() if not value.any()} == {*STAY, *wrong}
    assert f"4 tensors have no maps and stay zero, first proj, ln_pre.weight, ln_post.bias, {fused}" in caplog.text


@pytest.mark.parametrize("option", ["patch_qkv", "split_qkv"])
def test_closed_attention_stays(option: str, caplog: pytest.LogCaptureFixture) -> None:
    (source, target), images = pair("wider")
    found = moved(source, target, ([images[0]], [images[1]]), delta_of(source), **{option: False})
    stay = {key for key, value in found.items() if not value.any()}
    assert stay == {*STAY, *(key for key in found if ".attn." in key)}
    assert "8 tensors have no maps and stay zero, first transformer.resblocks.0.attn.in_proj_weight" in caplog.text


# --- modules of any kind ---------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A convolution, a norm over the batch, writing in place, a layer that runs twice, outputs in a tuple, integers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 2, 2), nn.BatchNorm2d(width)
        self.write, self.relu, self.twice = nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, width)
        self.rows, self.cell = nn.Embedding(4, width), nn.LSTM(width, width, batch_first=True)
        self.unused = nn.Linear(width, width)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).flatten(2).mT + self.rows(torch.arange(4))
        x = self.twice(self.twice(self.relu(self.write(x))))
        return self.factor * self.cell(x)[0].mean(1)


def odd(width: int, seed: int) -> Odd:
    torch.manual_seed(seed)
    return Odd(width).double().eval()


def test_any_module(caplog: pytest.LogCaptureFixture) -> None:
    source, target, images = odd(6, 0), odd(9, 1), torch.randn(20, 3, 4, 4, dtype=torch.float64)
    delta = delta_of(source)
    found = moved(source, target, [images], delta, strict=True)
    assert list(found) == list(delta)
    with torch.no_grad():
        inside = [net.norm(net.conv(images)) for net in (source, target)]
        flat = [x.flatten(2).mT + net.rows(torch.arange(4)) for x, net in zip(inside, (source, target), strict=True)]
        written = [net.write(x) for x, net in zip(flat, (source, target), strict=True)]
        last = [net.twice(x.relu()) for x, net in zip(written, (source, target), strict=True)]
        twice = [net.twice(x) for x, net in zip(last, (source, target), strict=True)]
    taps = {"conv.bias": [[net.conv(images) for net in (source, target)]], "norm.weight": [inside]}
    taps |= {
        "write.weight": [written, flat],
        "write.bias": [written],
        "twice.weight": [twice, last],
        "twice.bias": [twice],
    }
    for key, sides in taps.items():
        expected = delta[key].double()
        for axis, (s, t) in enumerate(sides):
            s, t = ((x.flatten(2).mT if x.ndim == 4 else x).flatten(0, 1).detach() for x in (s, t))
            expected = torch.tensordot(expected, reference_map(s.T @ t), dims=([axis], [0])).movedim(-1, axis)
        assert float((found[key] - expected).norm() / expected.norm()) <= ROUNDED, key
    moves = {key for key, value in found.items() if value.any()}
    assert moves == {*taps, "norm.bias", "norm.running_mean", "norm.running_var"}
    assert "conv.weight" in caplog.text  # named among those that stay


def test_modules_of_one_kind_that_run_differently_often() -> None:
    class Once(Odd):
        def forward(self, x: Tensor) -> Tensor:
            return self.twice(self.conv(x).flatten(2).mT)

    source, target = odd(6, 0), Once(9).double()
    with pytest.raises(ValueError, match=r"twice\.\w+ ran 2 times in the source, 1 times in the target"):
        moved(source, target, [torch.randn(4, 3, 4, 4, dtype=torch.float64)], delta_of(source))
