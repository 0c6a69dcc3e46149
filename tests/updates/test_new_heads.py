"""Heads that are new in the tune: they move whole, and what is written is of the class that has them."""

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from helpers.ended import EXACT, HEAD, IDS, adapter, build, fates, llama, logits, move, saved, with_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file
from theseus_transport.jobs.verify import verify
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    LlamaModel,
    ViTForImageClassification,
    ViTModel,
)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """Bare encoders, a causal model, and models with heads over classes tuned from them."""
    root = build(tmp_path_factory.mktemp("heads"))
    torch.manual_seed(1)
    encoder = tiny_models.vit("source", ViTModel)
    encoder.save_pretrained(root / "encoder")
    tiny_models.vit("source", labels=7).save_pretrained(root / "seven")
    tiny_models.vit("target", ViTModel).save_pretrained(root / "encoder-wide")
    labels = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
    image = ViTForImageClassification.from_pretrained(root / "encoder", num_labels=3, **labels)
    tiny_models.tuned(image, 0.1).save_pretrained(root / "image")
    causal = AutoModelForSequenceClassification.from_pretrained(root / "untied", num_labels=3)
    tiny_models.tuned(causal, 0.1).save_pretrained(root / "sequence")
    llama(LlamaModel).save_pretrained(root / "bare")
    bare = LlamaForSequenceClassification.from_pretrained(root / "bare", num_labels=3)
    tiny_models.tuned(bare, 0.1).save_pretrained(root / "bare-sequence")
    save_file({"pixel_values": torch.randn(60, 3, 8, 8)}, root / "pixels.safetensors")
    return root


PIXELS = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(6))
NEW = {
    "image": ("encoder", "image", "pixels.safetensors", AutoModelForImageClassification, PIXELS),
    "sequence": ("untied", "sequence", "ids.safetensors", AutoModelForSequenceClassification, IDS),
    "bare sequence": ("bare", "bare-sequence", "ids.safetensors", AutoModelForSequenceClassification, IDS),
}


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_new_head_moves_whole(classes, tmp_path, kind, alpha):
    """The written model is of the class that has it; at any strength the head is the tune's."""
    source, tuned, data, auto, inputs = NEW[kind]
    outcome = move(classes, tmp_path / "out", source, classes / tuned, source, data, alpha=alpha)
    moved, tune = auto.from_pretrained(tmp_path / "out"), auto.from_pretrained(classes / tuned)
    head = "classifier" if kind == "image" else "score"
    assert fates(outcome)[f"{head}.weight"] == ("transported", "new in the tuned model: whole")
    assert type(moved) is type(tune) and moved.config.id2label == tune.config.id2label
    torch.testing.assert_close(getattr(moved, head).weight, getattr(tune, head).weight, rtol=0.2, atol=0.1)
    if alpha == 1.0:
        assert (logits(moved, inputs) - logits(tune, inputs)).norm() < EXACT * logits(tune, inputs).norm()
    assert outcome.job["target_class"] == auto.__name__ and verify(tmp_path / "out") == []
    if kind == "sequence":
        assert fates(outcome)[HEAD] == ("left", "the tuned model has no such tensor")
        assert HEAD not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_new_head_replaces_one_of_other_classes(classes, tmp_path):
    """A tune of a model of 7 classes to 3."""
    outcome = move(classes, tmp_path / "out", "encoder", classes / "image", "seven", "pixels.safetensors")
    moved = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert moved.config.id2label == {0: "cat", 1: "dog", 2: "owl"} and moved.classifier.weight.shape == (3, 16)
    assert fates(outcome)["classifier.weight"][0] == "transported" and verify(tmp_path / "out") == []


@pytest.mark.parametrize("target, other", [("untied", False), ("wide", True), ("bare", True)])
def test_the_head_of_an_adapter(classes, tmp_path, target, other):
    auto = AutoModelForSequenceClassification
    options = {"task_type": "SEQ_CLS", "load": {"num_labels": 3}}
    given = adapter(tmp_path / "given", classes / "untied", auto, **options)
    outcome = move(classes, tmp_path / "out", "untied", given, target)
    torch.manual_seed(3)
    moved = with_adapter(classes / target, tmp_path / "out", auto, num_labels=3)
    assert saved(tmp_path / "out") == ["score.weight"] and verify(tmp_path / "out") == []
    assert outcome.job["target_class"] == auto.__name__ and outcome.job["target_options"] == ", num_labels=3"
    if not other:
        tuned = with_adapter(classes / "untied", given, auto, num_labels=3)
        assert (moved - tuned).norm() < EXACT * tuned.norm()


def test_a_new_head_in_python(classes):
    """It takes the place of the model's, which has to have one of as many outputs."""
    base, tune = (
        ViTModel.from_pretrained(classes / "encoder"),
        AutoModelForImageClassification.from_pretrained(classes / "image"),
    )
    maps = tt.align(base, base, [{"pixel_values": torch.randn(60, 3, 8, 8)}])
    target = ViTForImageClassification.from_pretrained(classes / "encoder", num_labels=3)
    update = tt.transport(maps, tt.Delta.between(base, tune), target)
    update.add_to(target)
    assert (logits(target, PIXELS) - logits(tune, PIXELS)).norm() < EXACT * logits(tune, PIXELS).norm()
    with pytest.raises(tt.InputRefused, match=r"has no classifier.weight of the target's shape; give one of the tuned"):
        update.add_to(ViTForImageClassification.from_pretrained(classes / "encoder", num_labels=2))


@pytest.mark.parametrize("target", ["encoder", "encoder-wide"])
def test_the_head_of_an_adapter_over_a_bare_encoder(classes, tmp_path, target):
    """Layers are named as the class with the head names them, not as the bare target."""
    auto = AutoModelForImageClassification
    options = {"modules_to_save": ["classifier"], "load": {"num_labels": 3}}
    given = adapter(tmp_path / "given", classes / "encoder", auto, **options)
    move(classes, tmp_path / "out", "encoder", given, target, "pixels.safetensors")
    models = [
        PeftModel.from_pretrained(auto.from_pretrained(classes / base, num_labels=3), tuned)
        for base, tuned in ((target, tmp_path / "out"), ("encoder", given))
    ]
    assert saved(tmp_path / "out") == ["classifier.bias", "classifier.weight"] and verify(tmp_path / "out") == []
    moved, tune = (logits(model, PIXELS) for model in models)
    assert torch.isfinite(moved).all() and (target != "encoder" or (moved - tune).norm() < EXACT * tune.norm())
