"""Capture: what the hooks saw is what the models computed, mixed as told; models are left as they were found."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact.models import LLAMA, LLAMA_HEADLESS, VIT, base, batches
from theseus_transport import InputRefused
from theseus_transport.activations import row_mixing
from theseus_transport.activations.capture import Capture, capture
from theseus_transport.activations.links import Pairs
from theseus_transport.activations.moments import CrossMoment, Energy
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import Pair
from torch import Tensor, nn

ROUNDING = dict(rtol=1e-11, atol=1e-11)  # float64 sums over up to 100 tokens, in another order
Models = tuple[nn.Module, nn.Module]

TEXT = base(LLAMA), base(LLAMA_HEADLESS, seed=5, width=36, num_attention_heads=2, intermediate_size=28)
IMAGES = base(VIT), base(VIT, seed=5, width=36, image_size=12)
IMAGE_MODELS = IMAGES[0].build(), IMAGES[1].build()


@pytest.fixture
def text() -> Models:
    return TEXT[0].build(), TEXT[1].build()


def geometries(models: Models) -> Pair[Geometry]:
    return Pair(*(Geometry.of(model.config) for model in models))


def corresponding(models: Models) -> Pairs:
    """Of two models of the same depth."""
    return Pairs.by_position(*geometries(models))


def both(models: Models) -> dict[str, tuple[int, ...]]:
    """All links, each with both sides."""
    return dict.fromkeys(corresponding(models).moments, (0, 1))


def seen(models: Models, *pairs: tuple[Mapping[str, Any], Mapping[str, Any]], energies: bool = True) -> Capture:
    with capture(*models, corresponding(models), energies=energies) as found:
        for source, target in pairs:
            found.run(source, target)
    return found


def ids(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 60, shape, generator=torch.Generator().manual_seed(seed))}


def activations(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every space and output as ``Geometry`` names it, [samples, tokens, width], through hooks of the test's own."""
    found: dict[str, Tensor] = {}
    geometry, backbone = Geometry.of(model.config), model.base_model

    def keep(name: str, side: str) -> Callable:
        return lambda _, args, result: found.__setitem__(name, args[0] if side == "input" else result)

    same = Pairs.by_position(geometry, geometry)
    links = {**same.moments, **same.energies}
    spaces = {name: link.target for name, link in links.items()}
    handles = [backbone.get_submodule(s.module).register_forward_hook(keep(n, s.side)) for n, s in spaces.items()]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def assert_moments(found: Capture, rows: Callable[[int, Tensor], Tensor], pairs: list[tuple[dict, dict]]) -> None:
    """``rows(side, activation)`` are the rows [samples, rows, width] the two sides should have in common."""
    expected: dict[str, CrossMoment | Energy] = {**found.moments, **found.energies}
    expected = {n: type(m).zeros(len(_side(m, 0)), len(_side(m, 1))) for n, m in expected.items()}
    for pair in pairs:
        sides = [activations(model, batch) for model, batch in pair]
        for name, into in expected.items():
            into.update(*(rows(i, side[name]).flatten(0, -2) for i, side in enumerate(sides)))
    for name, moment in found.moments.items():
        assert moment.count == expected[name].count > 0, name
        torch.testing.assert_close(moment.augmented, expected[name].augmented, **ROUNDING)
    for name, ours in [*found.moments.items(), *found.energies.items()]:
        for i in range(2):
            torch.testing.assert_close(_side(ours, i), _side(expected[name], i), **ROUNDING)


def _side(moment: CrossMoment | Energy, side: int) -> Tensor:
    names = ("source_energy", "target_energy") if isinstance(moment, CrossMoment) else ("source", "target")
    return getattr(moment, names[side])


# --- what is seen ----------------------------------------------------------------------------------------------------


def test_text_of_one_tokenizer(text: Models) -> None:
    found = seen(text, (ids(2, 7), ids(2, 7)))
    assert len(found.moments) == 2 * 4 + 1 and len(found.energies) == 2 * 7 + 1
    assert_moments(found, lambda _, x: x, [tuple((m, ids(2, 7)) for m in text)])
    assert not seen(text, (ids(2, 7), ids(2, 7)), energies=False).energies


def test_splits_of_batches_equal_the_whole(text: Models) -> None:
    whole = {**ids(6, 7), "attention_mask": (torch.arange(7) < torch.tensor([[7], [3], [5], [7], [1], [6]])).long()}
    once = seen(text, (whole, whole))
    parts = [{k: v[rows] for k, v in whole.items()} for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    split = seen(text, *zip(parts, parts, strict=True))
    for name, moment in once.moments.items():
        assert split.moments[name].count == moment.count == 29
        torch.testing.assert_close(split.moments[name].augmented, moment.augmented, **ROUNDING)
    for name, energy in once.energies.items():
        torch.testing.assert_close(split.energies[name].source, energy.source, **ROUNDING)
        torch.testing.assert_close(split.energies[name].target, energy.target, **ROUNDING)
        assert split.energies[name].centred == pytest.approx(energy.centred, rel=1e-11)


@pytest.mark.parametrize("together", [2, 5, 100])
def test_spaces_added_together_are_those_added_alone(text: Models, together: int) -> None:
    """As on a GPU, where several wait for one launch: moments, Grams and energies, of masked tokens too."""
    batch = {**ids(3, 7), "attention_mask": (torch.arange(7) < torch.tensor([[7], [3], [5]])).long()}

    def run(together: int) -> Capture:
        with capture(*text, corresponding(text), grams=both(text)) as found:
            found._together = together
            found.run(batch, batch)
            found.run(ids(2, 7), ids(2, 7))
            assert not found._waiting and not found._outputs
        return found

    many, one = run(together), run(1)
    for name, moment in one.moments.items():
        assert moment.count == many.moments[name].count == 15 + 14
        sides = zip(one.grams[name].values(), many.grams[name].values(), strict=True)
        for ours, other in ((moment, many.moments[name]), *sides):
            assert torch.equal(ours.augmented, other.augmented), name
    for name, energy in one.energies.items():
        assert torch.equal(energy.source, many.energies[name].source), name
        assert torch.equal(energy.target, many.energies[name].target) and energy.centred == many.energies[name].centred


@pytest.mark.parametrize("width, count", [(896, 3), (100, 2), (128, 2), (63, 4), (4096, 7)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiles_of_columns_follow_each_other(width: int, count: int, device: str) -> None:
    """On a GPU they begin where tokens are copied 16 bytes at a time, unless there are too few columns."""
    tiles = [
        Capture._columns(SimpleNamespace(_tile=(k, count), _device=torch.device(device)), width)  # type: ignore[arg-type]
        for k in range(count)
    ]
    assert [i for tile in tiles for i in range(width)[tile]] == list(range(width))
    aligned = device == "cuda" and width >= 64 * count
    most = 64 if aligned else 1  # longer than another at most by this, but for the last, which may be shorter
    assert max(t.stop - t.start for t in tiles) - min(t.stop - t.start for t in tiles[:-1]) <= most
    assert not aligned or all(t.start % 64 == 0 and t.stop > t.start for t in tiles)


def test_masked_tokens_have_no_influence(text: Models) -> None:
    mask = (torch.arange(7) < torch.tensor([[4], [7]])).long()
    first, second = ({"input_ids": torch.where(mask == 1, ids(2, 7)["input_ids"], pad)} for pad in (0, 13))
    found, other = (seen(text, ({**b, "attention_mask": mask},) * 2) for b in (first, second))
    for name, moment in found.moments.items():
        assert moment.count == 11
        assert torch.equal(moment.augmented, other.moments[name].augmented)
    assert all(torch.equal(e.target, other.energies[n].target) for n, e in found.energies.items())


def test_masks_of_ones_change_nothing(text: Models) -> None:
    plain, ones = ids(2, 7), {**ids(2, 7), "attention_mask": torch.ones(2, 7)}
    found, other = (seen(text, (batch, batch)).moments for batch in (plain, ones))
    for name, moment in found.items():
        torch.testing.assert_close(other[name].augmented, moment.augmented, **ROUNDING)


# Two samples cut by two tokenizers: 5 source tokens and 4 target tokens, specials and padding hold no characters.
OFFSETS = (
    torch.tensor([[[0, 0], [0, 2], [2, 3], [3, 7], [7, 9]], [[0, 0], [0, 4], [4, 6], [0, 0], [0, 0]]]),
    torch.tensor([[[0, 3], [3, 5], [5, 9], [9, 9]], [[0, 1], [1, 6], [6, 8], [0, 0]]]),
)


def test_text_of_two_tokenizers_is_mixed_by_characters(text: Models) -> None:
    sides = ids(2, 5), ids(2, 4, seed=1)
    found = seen(text, tuple({**b, "offsets": o} for b, o in zip(sides, OFFSETS, strict=True)))
    assert next(iter(found.moments.values())).count == 5
    matrices = [  # target tokens that share a character x source tokens
        torch.tensor([[0, 2 / 3, 1 / 3, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0.5, 0.5]], dtype=torch.float64),
        torch.tensor([[0, 1, 0, 0, 0], [0, 0.6, 0.4, 0, 0]], dtype=torch.float64),
    ]
    kept = [[0, 1, 2], [0, 1]]

    def rows(side: int, x: Tensor) -> Tensor:
        return torch.cat([one[kept[i]] if side else matrices[i] @ one for i, one in enumerate(x)])

    assert_moments(found, rows, [tuple(zip(text, sides, strict=True))])


def test_equal_offsets_are_one_tokenizer(text: Models) -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    spans = torch.tensor([[[0, 2], [2, 3], [3, 7], [7, 9]], [[0, 4], [4, 6], [6, 7], [0, 0]]])
    batch = {**ids(2, 4), "attention_mask": mask}
    by_mask, by_offsets = seen(text, (batch, batch)), seen(text, ({**batch, "offsets": spans},) * 2)
    for name, moment in by_mask.moments.items():
        assert by_offsets.moments[name].count == moment.count == 7
        torch.testing.assert_close(by_offsets.moments[name].augmented, moment.augmented, **ROUNDING)


def test_images_of_two_grids_are_interpolated() -> None:
    sides = [batches(spec, seed=1, count=1, shape=(3,))[0] for spec in IMAGES]
    mixing = row_mixing.bilinear((4, 4), (6, 6))
    found = seen(IMAGE_MODELS, tuple(sides))
    assert next(iter(found.moments.values())).count == 3 * 37

    def rows(side: int, x: Tensor) -> Tensor:
        return x if side else torch.stack([mixing(one) for one in x])

    assert_moments(found, rows, [tuple(zip(IMAGE_MODELS, sides, strict=True))])


def test_grams_follow_their_own_mixing() -> None:
    """Of a source that is interpolated and a target that is not, each with the rows that moments take of it."""
    sides = [batches(spec, seed=1, count=1, shape=(3,))[0] for spec in IMAGES]
    with capture(*IMAGE_MODELS, corresponding(IMAGE_MODELS), grams=both(IMAGE_MODELS)) as found:
        found.run(*sides)
    for name, moment in found.moments.items():
        energies = moment.source_energy, moment.target_energy
        for gram, energy in zip(found.grams[name].values(), energies, strict=True):
            torch.testing.assert_close(gram.cross.diagonal(), energy, **ROUNDING)
            torch.testing.assert_close(gram.source_energy, energy, **ROUNDING)
            assert gram.count == moment.count


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, target, message",
    [
        ({"attention_mask": torch.ones(2, 7)}, ids(2, 7), "the source batch has no input_ids, only attention_mask"),
        (ids(2, 7), {}, "the target batch has no input_ids, only nothing"),
        (ids(2, 7), ids(3, 7), "the source batch has 2 samples, the target batch 3"),
        (ids(2, 7), ids(2, 6), r"source input_ids are \[2, 7\], target input_ids \[2, 6\]; they must pair up"),
        ({**ids(2, 3), "attention_mask": torch.ones(2, 3)}, ids(2, 3), "masks of source and target differ; give both"),
        (ids(2, 3), {**ids(2, 3), "attention_mask": torch.ones(2, 3)}, "masks of source and target differ"),
        (
            {**ids(1, 2), "attention_mask": torch.tensor([[1, 0]])},
            {**ids(1, 2), "attention_mask": torch.tensor([[1, 1]])},
            "masks of source and target differ",
        ),
    ],
)
def test_batches_that_do_not_correspond(text: Models, source: dict, target: dict, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        seen(text, (source, target))


def test_images_need_pixels() -> None:
    batch = {"labels": torch.zeros(2)}
    with pytest.raises(InputRefused, match="the source batch has no pixel_values, only labels"):
        seen(IMAGE_MODELS, (batch, batch))


def twice(model: nn.Module) -> None:
    layer = model.base_model.layers[1]
    forward = layer.forward
    layer.forward = lambda x, *args, **kwargs: forward(forward(x, *args, **kwargs), *args, **kwargs)


def never(model: nn.Module) -> None:
    model.base_model.layers[1].forward = lambda x, *args, **kwargs: x


@pytest.mark.parametrize(
    "side, change, message",
    [
        (0, twice, r"layers\.1\.input_layernorm ran more than once in one forward pass of the source"),
        (1, twice, r"layers\.1\.input_layernorm ran more than once in one forward pass of the target"),
        (0, never, r"1\.attention was not seen in the forward pass of both models"),
        (1, never, r"1\.attention was not seen in the forward pass of both models \(11 such\)"),
    ],
)
def test_every_space_is_seen_once(text: Models, side: int, change: Callable, message: str) -> None:
    change(text[side])
    with pytest.raises(InputRefused, match=message):
        seen(text, (ids(2, 3), ids(2, 3)))


def test_a_model_that_is_not_what_its_config_says(text: Models) -> None:
    own = geometries(text)
    cases = {
        r"LlamaModel has no layers\.2\.input_layernorm; is it a llama\?": tuple(replace(la, depth=3) for la in own),
        r"LlamaForCausalLM has no layers\.0\.layernorm_before; is it a vit\?": geometries(IMAGE_MODELS),
        r"layers\.0\.input_layernorm is 36 wide, but the config says 40": (own[0], replace(own[1], width=40)),
        r"layers\.0\.mlp\.down_proj is 28 wide, but the config says 27": (own[0], replace(own[1], middle=27)),
    }
    for message, wrong in cases.items():
        with (
            pytest.raises(InputRefused, match=message),
            capture(*text, Pairs.by_position(*wrong), energies="embed" in message) as found,
        ):
            found.run(ids(2, 3), ids(2, 3))


# --- what is left behind ---------------------------------------------------------------------------------------------


def succeed(models: Models) -> None:
    with capture(*models, corresponding(models), energies=True) as found:
        assert not any(m.training for model in models for m in model.modules())
        found.run(ids(2, 3), ids(2, 3))


def fail_in_a_batch(models: Models) -> None:
    with pytest.raises(InputRefused), capture(*models, corresponding(models), energies=True) as found:
        found.run(ids(2, 3), ids(2, 4))


def fail_with_half_the_hooks_set(models: Models) -> None:
    deeper = tuple(replace(la, depth=3) for la in geometries(models))
    with pytest.raises(InputRefused), capture(*models, Pairs.by_position(*deeper), energies=True):
        pass


def fail_elsewhere(models: Models) -> None:
    with pytest.raises(ZeroDivisionError), capture(*models, corresponding(models), energies=True):
        _ = 1 / 0


@pytest.mark.parametrize("use", [succeed, fail_in_a_batch, fail_with_half_the_hooks_set, fail_elsewhere])
def test_models_are_as_they_were(text: Models, use: Callable[[Models], None]) -> None:
    for model in text:
        model.train()
    text[0].model.layers[0].eval()  # a mixture that one call of train() would not restore
    before = [m.training for model in text for m in model.modules()]
    state = [{k: v.clone() for k, v in model.state_dict().items()} for model in text]
    use(text)
    assert [m.training for model in text for m in model.modules()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in text for m in model.modules())
    for model, kept in zip(text, state, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
