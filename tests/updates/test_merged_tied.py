"""Adapters merged over a base that ties its head: it changes where PEFT changes it, and is told where it cannot."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from peft import LoraConfig
from test_merged import ALL, IDS, Q, trained
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.models.text_families import LLAMA
from theseus_transport.updates.adapter import Adapter
from theseus_transport.updates.merged import Merged
from torch import nn
from transformers import AutoModelForCausalLM

DORA = {"target_modules": Q, "use_dora": True}
KINDS: dict[str, dict] = {
    "tokens": {"target_modules": Q, "trainable_token_indices": [7, 2]},
    "tokens of the head": {"target_modules": Q, "trainable_token_indices": {"lm_head": [7, 2]}},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding, tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "saved": {**DORA, "modules_to_save": ["embed_tokens"]},
    "saved, tied": {**DORA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head saved": {**DORA, "modules_to_save": ["lm_head"]},
}
ALONG = {"tokens", "saved, tied"}  # what a tied target carries whole


@pytest.fixture(scope="module")
def tied(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tied source, and the same network with a head of its own."""
    model = AutoModelForCausalLM.from_pretrained(models / "tied" / "source")
    apart = tiny_models.llama("source", tie_word_embeddings=False)
    apart.load_state_dict(model.state_dict())
    folder = tmp_path_factory.mktemp("apart")
    apart.save_pretrained(folder)
    return {"tied": models / "tied" / "source", "apart": folder}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.double()


@pytest.fixture
def case(
    request: pytest.FixtureRequest, tied: dict[str, Path], tmp_path: Path
) -> tuple[str, Path, nn.Module, nn.Module]:
    """Its name, the adapter's folder, the base, and the PEFT model as it runs."""
    base = AutoModelForCausalLM.from_pretrained(tied["tied"])
    torch.manual_seed(0)
    tuned = trained(LoraConfig(r=4, lora_alpha=6, **KINDS[request.param]), base)
    tuned.save_pretrained(tmp_path / "lora")
    return request.param, tmp_path / "lora", base, tuned


def error(found: nn.Module, tuned: nn.Module, base: nn.Module) -> float:
    before, after = logits(base), logits(tuned)
    return float((logits(found) - after).norm() / (after - before).norm())


@pytest.mark.parametrize("case", KINDS, indirect=True)
def test_merged_is_what_peft_runs(case: tuple, tied: dict[str, Path]) -> None:
    _, folder, base, tuned = case
    merged = Merged(Checkpoint.open(tied["tied"]), Adapter.open(folder), LLAMA)
    own = copy.deepcopy(base)
    own.lm_head.weight = nn.Parameter(own.lm_head.weight.detach().clone())
    given = dict(merged)
    own.load_state_dict(given, strict=False)
    if merged.ties and "lm_head.weight" not in given:
        own.lm_head.weight = own.model.embed_tokens.weight
    assert error(own, tuned, base) < 1e-5  # float32
    source = Checkpoint.open(tied["tied"])
    assert all(torch.equal(given[name], source[name]) == (name not in merged.changed) for name in source)


@pytest.mark.parametrize("case", ["tokens", "embedding", "head", "saved, tied"], indirect=True)
def test_moved_to_the_same_network_it_is_the_tune(
    case: tuple, tied: dict[str, Path], tmp_path: Path, models: Path
) -> None:
    """Exactly where the target has a head of its own; where it ties, what it cannot hold is told."""
    name, folder, base, tuned = case
    for target, place in tied.items():
        out = tmp_path / target
        job = Job(str(tied["tied"]), str(folder), str(place), out, str(models / "ids.safetensors"), tokens=ALL)
        outcome = Session(replace(job, output="checkpoint")).run()
        whole = target == "apart" or name in ALONG
        assert (error(AutoModelForCausalLM.from_pretrained(out), tuned, base) < 1e-4) == whole  # maps of few tokens
        told = [text for text in outcome.warnings if "the target ties its head to the embedding" in text]
        assert len(told) == (not whole), outcome.warnings
