"""The block loop sees what whole models show, bit for bit."""

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.whole_models import load_model
from theseus_transport.activations.capture import capture
from theseus_transport.activations.links import Pairs
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import Pair
from theseus_transport.streaming.hidden_states import Hidden
from theseus_transport.streaming.loop import Loop
from theseus_transport.streaming.schedule import schedule
from theseus_transport.streaming.window import Window
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SIDES = (
    {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4},
)
TEXT = {"vocab_size": 60, "num_key_value_heads": 2, "max_position_embeddings": 64}
PLAIN = {"vocab_size": 60, "max_position_embeddings": 64}
IMAGE = {"image_size": 16, "patch_size": 4}


def pair(cls, config, **more):
    return [cls(config(**side, **more)) for side in SIDES]


def gpt2():
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    sizes = [{theirs: side[ours] for ours, theirs in names.items()} for side in SIDES]
    own = {"vocab_size": 60, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    return [GPT2LMHeadModel(GPT2Config(**side, **own)) for side in sizes]


def both_towers():
    text = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return [
        CLIPModel(CLIPConfig(vision_config={**side, **IMAGE}, text_config={**side, **text}, projection_dim=8))
        for side in SIDES
    ]


PAIRS = {
    "llama": lambda: pair(LlamaForCausalLM, LlamaConfig, **TEXT),
    "qwen2": lambda: pair(Qwen2ForCausalLM, Qwen2Config, layer_types=None, **TEXT),
    "qwen3": lambda: pair(Qwen3ForCausalLM, Qwen3Config, head_dim=8, **TEXT),
    "starcoder2": lambda: pair(Starcoder2ForCausalLM, Starcoder2Config, **TEXT),
    "gpt2": gpt2,
    "vit": lambda: pair(ViTModel, ViTConfig, **IMAGE),
    "vit with its classifier": lambda: pair(ViTForImageClassification, ViTConfig, **IMAGE),
    "clip": lambda: pair(CLIPVisionModel, CLIPVisionConfig, **IMAGE),
    "both towers of clip": both_towers,
    "siglip": lambda: pair(SiglipVisionModel, SiglipVisionConfig, **IMAGE),
    "dinov2 with registers": lambda: pair(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, **IMAGE),
    "llama to qwen2": lambda: [
        LlamaForCausalLM(LlamaConfig(**SIDES[0], **TEXT)),
        Qwen2ForCausalLM(Qwen2Config(**SIDES[1], **TEXT)),
    ],
    "clip to vit": lambda: [
        CLIPVisionModel(CLIPVisionConfig(**SIDES[0], **IMAGE)),
        ViTModel(ViTConfig(**SIDES[1], **IMAGE)),
    ],
}
ONE_TOKEN = "vit with its classifier", "both towers of clip"  # read behind their last blocks


def calibration(modality):
    """Three batches, the text of two lengths."""
    if modality == "vision":
        return [{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(3)]
    mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    return [{"input_ids": torch.randint(0, 60, (2, 9)), "attention_mask": mask} for _ in range(3)]


@pytest.mark.parametrize("name", PAIRS)
def test_the_loop_sees_what_whole_models_show(name, tmp_path):
    """Moments and energies of every link are the same bits, whichever blocks pair up, in memory or through files."""
    torch.manual_seed(0)
    for side, model in enumerate(PAIRS[name]()):
        tiny_models.randomised(model).save_pretrained(tmp_path / str(side))
    opened = [Checkpoint.open(tmp_path / str(side)) for side in range(2)]
    geometries = Pair(*(Geometry.of(checkpoint.config, checkpoint) for checkpoint in opened))
    assert geometries.target.one_token is (name in ONE_TOKEN)
    batches = [(batch, batch) for batch in calibration(geometries[0].family.modality)]
    for blocks in ([0, 1, None], [None, 0, 1], [1, None, None], [0, None, 1]):
        whole = [load_model(*side) for side in zip(opened, geometries, strict=True)]
        pairs = Pairs(*geometries, blocks)
        with capture(*whole, pairs) as seen:
            for batch in batches:
                seen.run(*batch)
        windows, resident = Pair(*map(Window, opened)), blocks[0] is None
        how = {"held": None, "grams": {}, "device": torch.device("cpu"), "folder": tmp_path / "hidden"}
        loop = Loop(windows, geometries, batches, **how, resident=resident)
        moments, energies = {}, {}
        for k, visit in enumerate(schedule(pairs, {*pairs.moments, *pairs.class_rows, *pairs.energies})):
            found = loop.visit(visit, first=k == 0)
            moments |= found.moments
            energies |= found.energies
            left = [n for side in loop.sides for n, p in side.skeleton.model.named_parameters() if not p.is_meta]
            assert all("norm" in n or "ln_" in n for n in left)  # weights are gone, but for norms between blocks
        assert moments.keys() == seen.moments.keys() and energies.keys() == seen.energies.keys()
        for link, moment in moments.items():
            for part in ("cross", "source_sum", "target_sum", "source_energy", "target_energy", "count"):
                ours, theirs = (getattr(m, part) for m in (moment, seen.moments[link]))
                assert ours == theirs if part == "count" else torch.equal(ours, theirs), (link, part)
        for link, energy in energies.items():
            assert torch.equal(energy.source, seen.energies[link].source)
            assert torch.equal(energy.target, seen.energies[link].target)
            assert energy.centred == seen.energies[link].centred


def test_hidden_states_in_files_are_those_in_memory(tmp_path):
    """Through sweeps, a save, and a restore in another object; no file stays that nothing needs."""
    states = [torch.randn(n, 3, 4).to(torch.bfloat16) for n in (2, 5, 1)]
    stores = [Hidden(tmp_path / str(r), "x", resident=r) for r in (True, False)]
    for hidden in stores:
        for state in states:
            hidden.append(state)
        for factor in (2, 3):
            for i in range(3):
                hidden.put(i, hidden[i] * factor)
        path = hidden.save()
        hidden.committed()
        for i in range(3):  # a sweep that is interrupted behind its second batch
            if i < 2:
                hidden.put(i, hidden[i] * 0)
        assert path.stat().st_size == hidden.nbytes == sum(2 * s.numel() for s in states)
    for resident in (True, False):
        again = Hidden.restored(tmp_path / "False", "x", stores[1].record(), resident=resident)
        assert all(torch.equal(again[i], state * 2 * 3) for i, state in enumerate(states))
    assert [p.name for p in (tmp_path / "False").iterdir()] == [f"x-{stores[1].record()['at']}.bin"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(tt.ResourceError, match=r"x-\d.bin ends after 23 of 24 bytes of batch 2"):
        Hidden.restored(tmp_path / "False", "x", stores[1].record(), resident=True)


@pytest.mark.parametrize("tiles", [2, 3, 7])
def test_tiles_of_columns_are_the_moments(tiles, tmp_path):
    """Hidden states go on once, energies and held-out rows are seen once, whatever the number of passes."""
    torch.manual_seed(0)
    for side, model in enumerate(PAIRS["llama"]()):
        tiny_models.randomised(model).save_pretrained(tmp_path / str(side))
    opened = [Checkpoint.open(tmp_path / str(side)) for side in range(2)]
    geometries = Pair(*(Geometry.of(checkpoint.config) for checkpoint in opened))
    batches, pairs = [(batch, batch) for batch in calibration("text")], Pairs(*geometries, [0, 1, None])
    visits = schedule(pairs, {*pairs.moments, *pairs.energies})
    found = []
    for n in (1, tiles):
        grams = {"0.context": (1,), "1.attention": (0, 1)}
        how = {"held": 2, "grams": grams, "device": torch.device("cpu"), "folder": tmp_path, "resident": True}
        loop = Loop(Pair(*map(Window, opened)), geometries, batches, **how, tiles=n)
        seen = [loop.visit(visit, first=k == 0) for k, visit in enumerate(visits)]
        found.append((seen, [loop.sides[side].hidden[i] for side in range(2) for i in range(3)]))
    (whole, states), (tiled, again) = found
    assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))
    for one, other in zip(whole, tiled, strict=True):
        assert one.moments.keys() == other.moments.keys() and one.kept.keys() == other.kept.keys()
        for name, moment in one.moments.items():
            assert other.moments[name].count == moment.count == 2 * 15
            size = moment.source_energy.sum().sqrt() * moment.target_energy.sum().sqrt()
            error = (other.moments[name].cross - moment.cross).abs().max() / size
            assert error <= 2**-23  # float32 products, added up in another order
            assert torch.equal(other.moments[name].target_energy, moment.target_energy)
            assert one.grams.get(name, {}).keys() == other.grams.get(name, {}).keys() == {*grams.get(name, ())}
            for s, gram in one.grams.get(name, {}).items():
                error = (other.grams[name][s].cross - gram.cross).abs().max() / gram.source_energy.sum()
                assert error <= 2**-23 and torch.equal(other.grams[name][s].target_energy, gram.target_energy)
        for name, energy in one.energies.items():
            assert torch.equal(energy.source, other.energies[name].source)
        assert all(torch.equal(a, b) for n in one.kept for a, b in zip(one.kept[n], other.kept[n], strict=True))
