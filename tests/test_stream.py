"""The block loop sees what whole models show, bit for bit, and goes on where it was interrupted."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import theseus_transport as tt
import tiny
import torch
from calls import held, identical
from safetensors.torch import save_file
from theseus_transport import passage as passage_module
from theseus_transport.align_job import AlignSession
from theseus_transport.alignment import Alignment
from theseus_transport.bases import AlignJob
from theseus_transport.capture import capture
from theseus_transport.checkpoint import Checkpoint
from theseus_transport.hidden import Hidden
from theseus_transport.job import Job, Session
from theseus_transport.links import energy_links, moment_links
from theseus_transport.output import write_update
from theseus_transport.schedule import schedule
from theseus_transport.spaces import Layout
from theseus_transport.stream import Loop
from theseus_transport.weights import Window
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
    ViTModel,
)
from whole import load_model

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
        tiny.randomised(model).save_pretrained(tmp_path / str(side))
    opened = [Checkpoint.open(tmp_path / str(side)) for side in range(2)]
    layouts = tuple(Layout.of(checkpoint.config) for checkpoint in opened)
    batches = [(batch, batch) for batch in calibration(layouts[0].family.modality)]
    for blocks in ([0, 1, None], [None, 0, 1], [1, None, None], [0, None, 1]):
        whole = [load_model(*side) for side in zip(opened, layouts, strict=True)]
        with capture(*whole, layouts, blocks=blocks) as seen:
            for batch in batches:
                seen.run(*batch)
        wanted = {*moment_links(*layouts, blocks), *energy_links(*layouts, blocks)}
        windows, resident = [Window(checkpoint) for checkpoint in opened], blocks[0] is None
        how = {"held": None, "grams": False, "device": torch.device("cpu"), "folder": tmp_path / "hidden"}
        loop = Loop(windows, layouts, batches, **how, resident=resident)
        moments, energies = {}, {}
        for k, visit in enumerate(schedule(*layouts, blocks, wanted)):
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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("models"))


def job_of(root, tmp_path, tuned, **options):
    folders = (str(root / name) for name in ("causal/source", tuned, "causal/target"))
    return Job(*folders, tmp_path / "out", str(root / "ids.safetensors"), tokens=256, batch_size=4, **options)


def of_whole_models(job, folder, kind):
    """What the library makes of the same job with both models whole in memory."""
    session = Session(replace(job, out=folder))
    data = session.bases.calibration()
    models = [load_model(*side) for side in zip(session.bases.checkpoints, session.bases.layouts, strict=True)]
    alignment = tt.align(*models, data.batches, recipe=job.recipe)
    update = tt.transport(alignment, session.delta, session.bases.target)
    write_update(update, folder, kind, base_name=job.target)
    return alignment


CASES = {
    "full": ("causal/tuned", "checkpoint", {}),
    "full, paper": ("causal/tuned", "checkpoint", {"recipe": tt.Recipe("paper", whiten_power=0.25)}),
    "delta, least squares": ("causal/tuned", "delta", {"output": "delta", "recipe": tt.Recipe(scale="regression")}),
    "lora": ("lora", "adapter", {}),
    "lora on few": ("patterns", "adapter", {}),
    "lora into a checkpoint": ("lora", "checkpoint", {"output": "checkpoint"}),
    "completed": ("causal/tuned", "checkpoint", {"recipe": tt.Recipe(null="completed")}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_job_writes_what_whole_models_give(name, root, tmp_path):
    """The same bytes, whether hidden states lie in files, and blocks are read ahead, or not."""
    tuned, kind, options = CASES[name]
    job = job_of(root, tmp_path, tuned, **options)
    outcome = Session(job).run()
    alignment = of_whole_models(job, tmp_path / "whole", kind)
    assert identical(job.out, tmp_path / "whole")
    wanted = {row["space"] for row in outcome.maps}
    assert [r for r in map(vars, alignment.reports) if r["space"] in wanted] == outcome.maps
    assert wanted == {r.space for r in alignment.reports} or tuned != "causal/tuned"
    files = replace(job, out=tmp_path / "files", offload_folder=tmp_path / "offload")
    Session(files).run()
    assert identical(job.out, files.out)


def test_every_weight_is_read_once(root, tmp_path):
    """Of all three checkpoints, but for vectors read again by every layer that needs them and rows of a check."""
    session = Session(job_of(root, tmp_path, "causal/tuned"))
    windows = (*session.bases.windows, session.window)
    matrices = [{n: [] for n, shape in w.shapes.items() if len(shape) > 1} for w in windows]
    for window, reads in zip(windows, matrices, strict=True):
        read = window.checkpoint.__class__.__getitem__

        def counted(name, window=window, reads=reads, read=read):
            if name in reads:
                reads[name].append(1)
            return read(window.checkpoint, name)

        window._whole = lambda name, counted=counted, window=window: window._checked(name, counted(name))
    session.run()
    assert [{n: len(r) for n, r in reads.items()} for reads in matrices] == [
        {n: 1 for n in reads} for reads in matrices
    ]


@pytest.mark.parametrize("name", ["full", "full, paper", "delta, least squares", "lora"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(name, root, tmp_path, monkeypatch):
    """Interrupted behind every single commit, and each time resumed by another session."""
    tuned, _, options = CASES[name]
    job = job_of(root, tmp_path, tuned, **options)
    Session(replace(job, out=tmp_path / "once")).run()
    commit = passage_module.Passage._commit

    def interrupted(self, loop):
        commit(self, loop)
        raise KeyboardInterrupt

    monkeypatch.setattr(passage_module.Passage, "_commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Session(job).run()
    steps = 1
    while not job.out.exists():
        with suppress(KeyboardInterrupt):
            Session(replace(job, resume=True)).run()
        steps += 1
    assert steps >= 3  # the embeddings, two blocks, and for a full tune the end
    assert identical(job.out, tmp_path / "once")
    manifests = [(out / "theseus.json").read_text().replace(str(out), "OUT") for out in (job.out, tmp_path / "once")]
    assert json.loads(manifests[0]) == json.loads(manifests[1])
    assert not (tmp_path / ".out.theseus").exists()


def test_a_run_of_other_inputs_is_not_gone_on_with(root, tmp_path, monkeypatch):
    job = job_of(root, tmp_path, "causal/tuned")
    commit = passage_module.Passage._commit

    def interrupted(self, loop):
        commit(self, loop)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(passage_module.Passage, "_commit", interrupted)
        Session(job).run()
    with pytest.raises(tt.InputRefused, match="--resume"):
        Session(job).run()
    with pytest.raises(tt.InputRefused, match="seed"):
        Session(replace(job, resume=True, seed=1)).run()
    other = tmp_path / "other"
    shutil.copytree(root / "causal/target", other)
    (other / "config.json").touch()
    with pytest.raises(tt.InputRefused, match="TARGET config.json time of change"):
        Session(replace(job, resume=True, target=str(other))).run()
    assert Session(replace(job, resume=True)).run().written == str(job.out)
    with pytest.raises(tt.TheseusError, match="whole|done|complete"):
        Session(replace(job, resume=True)).run()


def test_an_alignment_is_saved_as_it_is_made(root, tmp_path):
    """The folder that `theseus align` fills block by block loads as what :func:`align` returns."""
    source, target = (str(root / "causal" / side) for side in ("source", "target"))
    options = {"calibration": str(root / "ids.safetensors"), "tokens": 256, "batch_size": 4}
    job = AlignJob(source, target, tmp_path / "maps", **options)
    AlignSession(job).run()
    loaded = Alignment.load(job.out)
    alignment = of_whole_models(job_of(root, tmp_path, "causal/tuned"), tmp_path / "whole", "checkpoint")
    assert loaded.rules == alignment.rules and loaded.vectors == alignment.vectors
    assert loaded.reports == alignment.reports and set(loaded.maps) == set(alignment.maps)
    for name, t in alignment.maps.items():
        assert all(torch.equal(part, loaded.maps[name].tensors()[n]) for n, part in t.tensors().items())
    applied = Job.of_maps(str(job.out), str(root / "causal/tuned"), tmp_path / "applied")
    Session(applied).run()
    assert identical(applied.out, tmp_path / "whole")


def test_blocks_that_no_adapter_touches_are_not_read(root, tmp_path):
    """A LoRA on the first block's attention: no later block, and no MLP map."""
    config = json.loads((root / "lora" / "adapter_config.json").read_text())
    tensors = {n: t for n, t in held(root / "lora").items() if ".layers.0.self_attn.v_proj" in n}
    assert len(tensors) == 2
    folder = tmp_path / "first"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["v_proj"]}))
    session = Session(replace(job_of(root, tmp_path, "lora"), tuned=str(folder)))
    held_names = []
    for window in session.bases.windows:
        hold = window.hold
        window.hold = lambda names, hold=hold: (held_names.extend(names), hold(names))
    outcome = session.run()
    assert {row["space"] for row in outcome.maps} == {"0.attention", "0.context"}
    assert outcome.skipped == "1 of 2 blocks were not run, 7 of 9 spaces not mapped"
    assert held_names and not [n for n in held_names if ".layers.1." in n]


def test_depths_are_paired_block_by_block(root, tmp_path):
    """A target with a block more: the pairing of the streamed pass is that of whole models."""
    torch.manual_seed(3)
    deep = tiny.llama("target", depth=3)
    deep.save_pretrained(tmp_path / "deep")
    job = replace(job_of(root, tmp_path, "causal/tuned"), target=str(tmp_path / "deep"))
    outcome = Session(job).run()
    alignment = of_whole_models(job, tmp_path / "whole", "checkpoint")
    assert outcome.blocks == alignment.blocks and outcome.blocks.count(None) == 1
    assert identical(job.out, tmp_path / "whole")


def test_rank_poor_first_maps_are_completed_at_the_end(root, tmp_path):
    """Four token types: the first block's q, k and v wait for all of depth, and survive an interruption."""
    save_file({"input_ids": torch.randint(3, 7, (32, 16))}, tmp_path / "poor.safetensors")
    job = replace(job_of(root, tmp_path, "causal/tuned"), calibration=str(tmp_path / "poor.safetensors"))
    outcome = Session(job).run()
    assert {"0.attention.completed"} <= {row["space"] for row in outcome.maps}
    of_whole_models(job, tmp_path / "whole", "checkpoint")
    assert identical(job.out, tmp_path / "whole")


def test_the_folder_of_hidden_states_is_empty_afterwards(root, tmp_path):
    offload = tmp_path / "offload"
    Session(job_of(root, tmp_path, "causal/tuned", offload_folder=offload)).run()
    assert not [path for path in Path(offload).rglob("*") if path.is_file()]


@pytest.mark.parametrize("tiles", [2, 3, 7])
def test_tiles_of_columns_are_the_moments(tiles, tmp_path):
    """Hidden states go on once, energies and held-out rows are seen once, whatever the number of passes."""
    torch.manual_seed(0)
    for side, model in enumerate(PAIRS["llama"]()):
        tiny.randomised(model).save_pretrained(tmp_path / str(side))
    opened = [Checkpoint.open(tmp_path / str(side)) for side in range(2)]
    layouts = tuple(Layout.of(checkpoint.config) for checkpoint in opened)
    batches, blocks = [(batch, batch) for batch in calibration("text")], [0, 1, None]
    visits = schedule(*layouts, blocks, {*moment_links(*layouts, blocks), *energy_links(*layouts, blocks)})
    found = []
    for n in (1, tiles):
        how = {"held": 2, "grams": False, "device": torch.device("cpu"), "folder": tmp_path, "resident": True}
        loop = Loop([Window(checkpoint) for checkpoint in opened], layouts, batches, **how, tiles=n)
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
        for name, energy in one.energies.items():
            assert torch.equal(energy.source, other.energies[name].source)
        assert all(torch.equal(a, b) for n in one.kept for a, b in zip(one.kept[n], other.kept[n], strict=True))
