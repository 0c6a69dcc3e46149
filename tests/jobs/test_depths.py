"""`--depth`: which source block feeds which target block, through the command and in Python alike."""

import json
from dataclasses import replace

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.command import FAST, held, identical, invoke, outcome_of, refused
from helpers.whole_models import of_whole_models
from peft import PeftModel
from safetensors.torch import save_file
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from transformers import LlamaForCausalLM

SIZES = {"source": (3, 4, 6), "target": (3, 4, 7)}
WRITERS = "self_attn.o_proj", "mlp.down_proj"
FIRST = 1  # block of the source that the adapters change


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("depths")
    torch.manual_seed(0)
    for side, depths in SIZES.items():
        for depth in depths:
            model = tiny_models.llama(side, depth=depth)
            model.save_pretrained(root / f"{side}{depth}")
            if side == "source":
                blocks = list(range(FIRST, depth))
                how = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": blocks}
                tiny_models.adapter(root / f"lora{depth}", model, **how)
    save_file({"input_ids": torch.randint(0, tiny_models.VOCABULARY, (16, 16))}, root / "ids.safetensors")
    return root


def job_of(root, out, source, target, depth, **choices):
    places = (str(root / name) for name in (f"source{source}", f"lora{source}", f"target{target}"))
    recipe = tt.Recipe("effect", **choices)
    how = {"tokens": 192, "batch_size": 4, "held_out": False, "alpha": 1.0, "recipe": recipe, "depth": str(depth)}
    return Job(*places, out, str(root / "ids.safetensors"), **how)


def told(folder, blocks):
    path = folder / "blocks.json"
    path.write_text(json.dumps(blocks))
    return path


CASES = {  # depths, as asked, the pairing
    "deeper, compared": (3, 4, "similarity", None),
    "deeper, spread": (3, 4, "relative", [0, 1, 2, None]),
    "deeper, told": (3, 4, [None, 0, 1, 2], [None, 0, 1, 2]),
    "shallower, compared": (4, 3, "similarity", None),
    "shallower, told": (4, 3, [0, 1, 3], [0, 1, 3]),
    "by one in seven, spread": (6, 7, "relative", [0, 1, 2, 3, 4, 5, None]),
    "by one in seven, told": (6, 7, [0, 1, 2, None, 3, 4, 5], [0, 1, 2, None, 3, 4, 5]),
    "equal, told otherwise": (4, 4, [None, 0, None, 2], [None, 0, None, 2]),
}


@pytest.mark.parametrize("prior", ["none", "coherent"])
@pytest.mark.parametrize("name", CASES)
def test_every_block_from_the_first_that_changed_is_fitted(name, prior, root, tmp_path):
    source, target, asked, blocks = CASES[name]
    depth = told(tmp_path, asked) if isinstance(asked, list) else asked
    job = job_of(root, tmp_path / "out", source, target, depth, prior=prior)
    outcome = Session(job).run()
    assert blocks is None or outcome.blocks == blocks
    alignment = of_whole_models(job, tmp_path / "whole", "adapter")
    assert alignment.blocks == outcome.blocks and identical(job.out, tmp_path / "whole")
    first = next(b for b, own in enumerate(outcome.blocks) if own is not None and own >= FIRST)
    written = {f"{b}.{writer}" for b in range(first, target) for writer in WRITERS}
    moved = {f"{b}.self_attn.q_proj" for b in range(first, target) if outcome.blocks[b] is not None}
    layers = {name.split(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in held(job.out)}
    assert layers == (written | moved if prior == "coherent" else written)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(job.target), job.out)
    there = {name: p for name, p in loaded.named_parameters() if ".lora_B." in name}
    assert len(there) == len(layers) and all(p.abs().sum() > 0 for p in there.values())


def test_equal_depths_are_paired_one_to_one_unless_told(root, tmp_path):
    for depth in ("similarity", "relative"):
        assert Session(job_of(root, tmp_path / depth, 3, 3, depth)).run().blocks == [0, 1, 2]


def test_a_pairing_is_read_by_the_command_and_part_of_what_a_run_goes_on_with(root, tmp_path):
    folders = [root / name for name in ("source3", "lora3", "target4")]
    calls = [*folders, tmp_path / "out", "--calibration", root / "ids.safetensors", *FAST, "--alpha", 1]
    invoke("transport", *calls, "--depth", told(tmp_path, [0, None, 1, 2]))
    assert outcome_of(tmp_path / "out")["blocks"] == [0, None, 1, 2]
    invoke("transport", *calls, "--depth", tmp_path / "blocks.json", "--resume")
    refused("depth", "transport", *calls, "--depth", "relative", "--resume")
    refused("depth", "transport", *calls, "--depth", told(tmp_path, [0, 1, None, 2]), "--resume")


def test_blocks_that_are_told_are_not_compared(root, tmp_path):
    """No pass before, and no time for one."""
    compared, given = (Session(job_of(root, tmp_path / d, 3, 4, d, prior="none")) for d in ("similarity", "relative"))
    assert "pairing" in compared.plan.host and "pairing" not in given.plan.host
    assert sum(given.seconds.values()) < sum(compared.seconds.values())
    assert given.run().bytes_read < compared.run().bytes_read


@pytest.mark.parametrize(
    ("blocks", "choices", "stay"),
    [([0, 1, 3], {"prior": "none"}, None), ([0, 1, 2], {"prior": "none"}, 3),
     ([0, 1, 3], {"prior": "coherent", "fit": False}, 2)],
)  # fmt: skip
def test_source_blocks_that_feed_none_are_named_where_their_effect_is_lost(blocks, choices, stay, root, tmp_path):
    outcome = Session(job_of(root, tmp_path / "out", 4, 3, told(tmp_path, blocks), **choices)).run()
    said = [text for text in outcome.warnings if "takes source blocks" in text]
    assert said == [f"no block of the target takes source blocks {stay}: their updates stay"] * (stay is not None)


def test_an_alignment_keeps_its_pairing(root, tmp_path):
    bases = root / "source3", root / "target4"
    depth = told(tmp_path, [None, 0, 1, 2])
    invoke("align", *bases, tmp_path / "maps", "--calibration", root / "ids.safetensors", *FAST, "--depth", depth,
           "--recipe", "coherent")  # fmt: skip
    depth.unlink()
    assert tt.Alignment.load(tmp_path / "maps").blocks == [None, 0, 1, 2]
    invoke("apply", tmp_path / "maps", root / "lora3", tmp_path / "out")
    assert outcome_of(tmp_path / "out")["blocks"] == [None, 0, 1, 2]


WRONG = {
    "[0, 1, 2]": r"is \[0, 1, 2\], expected 4 entries, one a block of the target; give similarity or relative",
    "[0, 1, 2, 3]": "names block 3 of the source, which has 3; give",
    "[0, 2, 1, null]": r"is \[0, 2, 1, None\], which turns back at 1; give",
    "[0, 1, 1, 2]": "turns back at 1",
    "[null, null, null, null]": "pairs no block at all",
    "[0, 1, true, 2]": "names block True",
    '{"0": 1}': r"holds .*; give a list, as \[0, null, 1\]",
    "[0, 1": r"is no JSON .*; give a list",
    "[" * 100_000: "is no JSON",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:20])
def test_a_file_that_is_no_pairing_is_refused_before_anything_runs(text, root, tmp_path):
    path = tmp_path / "blocks.json"
    path.write_text(text)
    with pytest.raises(tt.InputRefused, match=rf"^--depth.* {WRONG[text]}"):
        Session(job_of(root, tmp_path / "out", 3, 4, path))


def test_a_word_that_is_none_is_refused(root, tmp_path):
    with pytest.raises(tt.InputRefused, match="--depth relativ is no file; give similarity, relative or a JSON list"):
        Session(job_of(root, tmp_path / "out", 3, 4, "relativ"))
    models = tiny_models.llama("source"), tiny_models.llama("target")
    for wrong in ("relativ", [1, 0], 3, None):
        with pytest.raises(tt.InputRefused, match="depth is .*; give similarity or relative, or for each block"):
            tt.align(*models, [{"input_ids": torch.ones(2, 8, dtype=torch.long)}], depth=wrong)


def test_the_output_may_not_lie_over_the_pairing(root, tmp_path):
    path = told(tmp_path, [0, 1, 2, None])
    job = job_of(root, path, 3, 4, path)
    with pytest.raises(tt.InputRefused):
        Session(replace(job, overwrite=True)).run()
    assert json.loads(path.read_text()) == [0, 1, 2, None]
