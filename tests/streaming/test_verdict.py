"""How much of a tune arrived, by predictions: 1 where all of it did, 0 without an update, below where it is further."""

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from theseus_transport.activations import row_mixing
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.models.base import Base
from theseus_transport.models.pair import Pair
from theseus_transport.streaming.verdict import Head, Prediction, removed, shared_head
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, ViTModel

OUTPUTS, ROWS = 11, 40
HEAD = Head("vocabulary", OUTPUTS)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Weights(dict):
    def rows(self, name, rows):
        return self[name][rows]


def predicts(logits):
    """A model with these logits [rows, outputs]."""
    return Prediction(logits, Weights(head=torch.eye(OUTPUTS).double()), "head", None)


TARGET, SOURCE, CHANGE = 3 * draw(1, ROWS, OUTPUTS), 3 * draw(2, ROWS, OUTPUTS), draw(3, ROWS, OUTPUTS)


def share(updated, change=CHANGE):
    found = removed(HEAD, predicts(TARGET), Pair(predicts(SOURCE), predicts(SOURCE + change)), {1.0: predicts(updated)})
    return found.get(1.0)


def test_all_of_it_is_the_targets_logits_changed_as_the_sources():
    assert share(TARGET + CHANGE) == pytest.approx(1, abs=1e-12)
    assert share(TARGET + CHANGE + 7) == pytest.approx(1, abs=1e-12)  # softmax sees no common shift


def test_without_an_update_nothing_arrived():
    assert share(TARGET) == pytest.approx(0, abs=1e-12)


def test_the_opposite_is_worse_than_nothing():
    assert share(TARGET - CHANGE) < -1


def test_a_part_of_it_is_in_between_and_twice_as_much_is_too_much():
    assert 0 < share(TARGET + 0.3 * CHANGE) < share(TARGET + 0.7 * CHANGE) < 1
    assert share(TARGET + 2 * CHANGE) < 0.1


def test_a_tune_that_changes_no_prediction_tells_nothing():
    assert share(TARGET + CHANGE, change=torch.full((ROWS, 1), 4.0)) is None


@pytest.mark.parametrize("size", [1.0, 200.0])
def test_shares_are_those_of_divergences_in_one_piece(size, monkeypatch):
    """In tiles of outputs, and where exponentials of logits overflow."""
    change, updated = size * CHANGE, TARGET + size * draw(4, ROWS, OUTPUTS)
    wanted = torch.log_softmax(TARGET + change, 1)
    left, start = ((wanted.exp() * (wanted - torch.log_softmax(x, 1))).sum(1).mean() for x in (updated, TARGET))
    assert share(updated, change) == pytest.approx(float(1 - left / start), abs=1e-9)
    monkeypatch.setattr(Head, "tiles", lambda *_: (slice(0, 4), slice(4, 10), slice(10, 11)))
    assert share(updated, change) == pytest.approx(float(1 - left / start), abs=1e-9)


# --- which heads tell -------------------------------------------------------------------------------------------------
def bases(*models):
    return Pair(*map(Base.of, models))


NO_MIXING = Pair(None, None)
MIXED = Pair(row_mixing.linear(20, 9), None)


def shared(*models, rows=NO_MIXING, one_tokenizer=False):
    return shared_head(bases(*models), rows, one_tokenizer=one_tokenizer)


def classifier(side, labels):
    return tiny_models.llama(side, LlamaForSequenceClassification, num_labels=labels)


def test_heads_of_the_same_classes_tell():
    assert shared(tiny_models.vit("source"), tiny_models.vit("target")) == Head("classes", 5)
    assert shared(classifier("source", 3), classifier("target", 3)) == Head("classes", 3)
    assert shared(classifier("source", 3), classifier("target", 3), rows=MIXED) == Head("classes", 3)


def test_heads_of_other_classes_or_of_one_do_not():
    assert shared(tiny_models.vit("source"), tiny_models.vit("target", labels=4)) is None
    assert shared(classifier("source", 1), classifier("target", 1)) is None  # a score has no divergence
    assert shared(tiny_models.vit("source"), tiny_models.vit("target", ViTModel)) is None


def test_heads_of_one_vocabulary_tell_tied_or_not():
    head = Head("vocabulary", tiny_models.VOCABULARY)
    plain, tied = (
        [tiny_models.llama(side, tie_word_embeddings=tie) for side in tiny_models.SIZES] for tie in (False, True)
    )
    assert shared(*plain) == shared(*tied) == shared(plain[0], tied[1]) == head
    assert shared(plain[0], tiny_models.llama("target", LlamaModel)) is None


def test_vocabularies_of_other_sizes_tell_where_they_are_one_tokenizers():
    own, other = tiny_models.llama("source"), tiny_models.llama("target")
    other.resize_token_embeddings(320)
    assert shared(own, other) is None
    assert shared(own, other, one_tokenizer=True) == shared(other, own, one_tokenizer=True) == Head("vocabulary", 300)


def test_vocabularies_of_two_tokenizers_tell_nothing():
    models = [tiny_models.llama(side) for side in tiny_models.SIZES]
    assert shared(*models, rows=MIXED) is None


def test_a_classifier_and_a_language_model_share_no_head():
    assert shared(classifier("source", 3), tiny_models.llama("target")) is None


# --- of whole jobs ----------------------------------------------------------------------------------------------------
def told(root, out, target="causal/source", tuned="causal/tuned", **options):
    folders = (str(root / name) for name in ("causal/source", tuned, target))
    return Session(Job(*folders, out, str(root / "ids.safetensors"), tokens=256, batch_size=4, **options)).run()


@pytest.mark.parametrize("tuned", ["causal/tuned", "lora"])
def test_between_copies_of_a_model_all_of_it_arrives_at_strength_one(tuned, models, tmp_path):
    """Behind the exact prior nothing is missing: all shares are 1 to rounding, and no other strength is better."""
    outcome = told(models, tmp_path / "out", tuned=tuned, recipe=tt.Recipe("effect", prior="coherent"))
    assert outcome.removed["1"] == pytest.approx(1, abs=1e-3)
    assert all(share < outcome.removed["1"] for alpha, share in outcome.removed.items() if alpha != "1")
    assert outcome.removed.keys() == {"0.25", "0.5", "0.75", "1", "1.25", "1.5", "2"}
    assert outcome.alphas[0]["alpha"] == 1
    assert [one["share"] for one in outcome.arrived] == pytest.approx([1] * 4, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_what_is_said_of_a_strength_is_so_of_the_model_that_is_written_at_it(alpha, models, tmp_path):
    """By whole models, on the rows that were held out, all logits at once; float32 on both sides."""
    recipe = tt.Recipe("effect", prior="none")
    tried = told(models, tmp_path / "tried", "causal/target", recipe=recipe)
    told(models, tmp_path / "out", "causal/target", recipe=recipe, alpha=alpha)
    job = Job(*(str(models / f"causal/{n}") for n in ("source", "tuned", "target")), tmp_path / "no",
              str(models / "ids.safetensors"), tokens=256, batch_size=4, recipe=recipe)  # fmt: skip
    held = Session(job).fitted.calibration().held
    folders = (*(models / f"causal/{name}" for name in ("source", "tuned", "target")), tmp_path / "out")
    with torch.no_grad():
        logits = [
            LlamaForCausalLM.from_pretrained(folder)(held.source["input_ids"]).logits.double().flatten(0, 1)
            for folder in folders
        ]
    source, tuned, target, moved = logits
    assert len(target) <= 512, "else only some rows are compared"
    wanted = torch.log_softmax(target + tuned - source, 1)
    left, start = ((wanted.exp() * (wanted - torch.log_softmax(x, 1))).sum(1).mean() for x in (moved, target))
    assert tried.removed[f"{alpha:g}"] == pytest.approx(float(1 - left / start), abs=1e-3)
    assert abs(tried.removed[f"{alpha:g}"]) > 0.01
    best = max(tried.removed, key=tried.removed.get)
    assert tried.alphas[0]["alpha"] == float(best)


def test_recipes_that_fit_nothing_say_what_arrived_too(models, tmp_path):
    outcome = told(models, tmp_path / "out", recipe=tt.Recipe("coherent"))
    assert outcome.removed == {"1": pytest.approx(1, abs=1e-3)} and len(outcome.arrived) == 4
    assert not outcome.fits["share"]
