"""Jobs that write an adapter at a rank: of a LoRA, of a full tune, of an adapter that is merged on the way."""

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from theseus_transport.cli.report import report
from theseus_transport.files.result_folder import read_manifest
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from transformers import LlamaForCausalLM, ViTForImageClassification

FITTED = tt.Recipe("effect", prior="none")
OUTSIDE = ("lm_head*", "embed*", "norm.weight")
ROUNDING = 1e-5  # of float32 factors and sums, beside updates of norm about 1


def job(root: Path, out: Path, pair: str = "causal", tuned: str = "", data: str = "ids", **options: object) -> Job:
    folders = (str(root / name) for name in (f"{pair}/source", tuned or f"{pair}/tuned", f"{pair}/target"))
    return Job(*folders, out, str(root / f"{data}.safetensors"), **{"tokens": 10**6, "output": "adapter", **options})


def run(one: Job) -> dict[str, torch.Tensor]:
    """What changes in the target as PEFT, or a checkpoint, has it."""
    Session(one).run(lambda stage, steps: lambda: None)
    made = ViTForImageClassification if "image" in one.target else LlamaForCausalLM
    base = made.from_pretrained(one.target)
    start = {name: value.clone() for name, value in base.state_dict().items()}
    if one.output == "adapter":
        found = PeftModel.from_pretrained(base, one.out).merge_and_unload().state_dict()
    else:
        found = made.from_pretrained(one.out).state_dict()
    return {name: found[name] - value for name, value in start.items() if not torch.equal(found[name], value)}


def best(value: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(value, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("pair, data", [("causal", "ids"), ("image", "both")])
def test_a_full_tune_as_an_adapter_is_the_checkpoint_cut(models, tmp_path, pair, data):
    recipe = tt.Recipe("coherent")
    whole = run(job(models, tmp_path / "whole", pair, data=data, output="checkpoint", recipe=recipe))
    for options, rank in (({}, 16), ({"rank": 3}, 3)):
        found = run(job(models, tmp_path / f"adapter-{rank}", pair, data=data, recipe=recipe, **options))
        inside = {n for n in whole if "layers" in n and n.endswith("weight") and whole[n].ndim == 2}
        assert found.keys() == inside | {n for n in whole if n.startswith("classifier")}
        for name, value in found.items():
            expected = best(whole[name], rank) if name in inside else whole[name]
            assert (value - expected).norm() <= ROUNDING * whole[name].norm() + ROUNDING, name


def test_a_fitted_full_tune_as_an_adapter_nears_the_checkpoint(models, tmp_path):
    whole = run(job(models, tmp_path / "whole", output="checkpoint", recipe=FITTED, leave=OUTSIDE))
    found = run(job(models, tmp_path / "out", recipe=FITTED, rank=1000, leave=OUTSIDE))
    assert found.keys() == whole.keys() and {name.split(".")[-2] for name in found} == {"o_proj", "down_proj"}
    for name, value in found.items():
        assert (value - whole[name]).norm() <= 1e-3 * whole[name].norm(), name  # what carry makes of rounding


@pytest.mark.parametrize("recipe", [tt.Recipe("coherent"), FITTED], ids=["coherent", "effect"])
def test_an_adapter_is_written_at_the_rank_asked_for(models, tmp_path, recipe):
    for rank in (1, 9):
        one = job(models, tmp_path / str(rank), tuned="lora", recipe=recipe, rank=rank)
        assert run(one)
        shapes = [value.shape for value in load_file(one.out / "adapter_model.safetensors").values()]
        assert max(min(shape) for shape in shapes) == (rank if recipe.fits else min(rank, 4))  # 4 is its own


def test_an_adapter_that_factors_cannot_carry_is_merged_and_cut(models, tmp_path):
    base = LlamaForCausalLM.from_pretrained(models / "causal" / "source")
    tiny_models.adapter(tmp_path / "dora", base, target_modules=["q_proj", "v_proj"], use_dora=True)
    one = job(models, tmp_path / "out", tuned=str(tmp_path / "dora"), recipe=tt.Recipe("coherent"))
    with pytest.raises(tt.InputRefused, match=r"holds DoRA, which .* --output adapter --rank 16"):
        run(one)
    whole = run(replace(one, output="checkpoint", out=tmp_path / "whole"))
    found = run(replace(one, rank=5))
    assert found.keys() == whole.keys()
    for name, value in found.items():
        assert (value - best(whole[name], 5)).norm() <= ROUNDING * whole[name].norm() + ROUNDING


def test_what_is_no_adapter_has_no_rank(models, tmp_path):
    with pytest.raises(tt.InputRefused, match="--rank 4 is of an adapter, a delta has none"):
        run(job(models, tmp_path / "out", tuned="lora", output="delta", rank=4))


def test_what_was_fitted_and_what_a_rank_keeps_is_told_everywhere(models, tmp_path):
    """On screen, in --json (the outcome), in the manifest and in the card."""
    one = job(models, tmp_path / "out", tuned="lora", recipe=tt.Recipe("effect", prior="coherent"), rank=2)
    outcome = Session(one).run(lambda stage, steps: lambda: None)
    assert outcome.rank == 2 and outcome.fits["share"].keys() == {
        f"layers.{b}.{part}" for b in range(2) for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert all(share == 1 for share in outcome.fits["share"].values())  # the LoRA has none of these layers
    kept = outcome.fits["kept"]
    assert len(kept) == 4 + 4 and all(0 < share < 1 for share in kept.values())
    rows = {row["tensor"]: row for row in outcome.coverage}
    share = kept["layers.0.self_attn.q_proj"]
    assert rows["layers.0.self_attn.q_proj"]["note"] == f"as factors; its rank keeps {share:.0%}"
    assert rows["layers.1.mlp.down_proj"]["fate"] == "fitted"
    card, told = (one.out / "README.md").read_text(), read_manifest(one.out)["metadata"]["outcome"]
    assert (told["fits"], told["rank"]) == (outcome.fits, 2)
    screen = StringIO()
    Console(file=screen, width=300).print(report(outcome))
    for text in (card, screen.getvalue()):
        assert "4 of them added, which TUNED has no factors of: down_proj, o_proj" in text
        assert f"least {min(kept.values()):.0%}, {min(kept, key=kept.get)}" in text
    assert "fitted to what was missing of its effect" in card
    assert re.search(r"q_proj +2 +transported +as factors; its rank keeps (\d+ to )?\d+%", screen.getvalue())


def test_without_fits_and_cuts_there_is_no_word_of_them(models, tmp_path):
    one = job(models, tmp_path / "out", tuned="lora", recipe=tt.Recipe("coherent"))
    outcome = Session(one).run(lambda stage, steps: lambda: None)
    card = (one.out / "README.md").read_text()
    assert "fitted" not in card and "| rank | 4 |" in card and outcome.fits == {"share": {}, "kept": {}}


def test_a_run_that_goes_on_writes_the_bytes_and_tells_the_cuts_of_one_that_was_not_stopped(models, tmp_path):
    """Killed behind the first block: what was fitted and cut there is known to the second process."""
    recipe = tt.Recipe("effect", prior="coherent")
    whole, stopped = (job(models, tmp_path / name, recipe=recipe, rank=3, alpha=1.0) for name in ("a", "b"))
    expected = Session(whole).run(lambda stage, steps: lambda: None)
    written = 0

    def stop(stage, steps):
        def step():
            nonlocal written
            written += stage == "write"
            if stage == "align" and written > 8:  # of a block, both factors of seven layers
                raise KeyboardInterrupt

        return step

    with pytest.raises(KeyboardInterrupt, match="--resume"):
        Session(stopped).run(stop)
    outcome = Session(replace(stopped, resume=True)).run(lambda stage, steps: lambda: None)
    assert (outcome.fits, outcome.coverage) == (expected.fits, expected.coverage) and len(outcome.fits["kept"]) == 14
    name = "adapter_model.safetensors"
    assert (stopped.out / name).read_bytes() == (whole.out / name).read_bytes()
