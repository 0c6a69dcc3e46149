"""What jobs of many kinds take is what was predicted at most, by the kernel's own count."""

import json
from dataclasses import replace
from functools import partial
from random import Random

import numpy as np
import pytest
import torch
from helpers.allocated import peak_of
from helpers.forked import apart
from helpers.large_pairs import ModelSizes, write_random
from PIL import Image
from random_checkpoint import write_adapter
from safetensors.torch import save_file
from test_stream_memory import MIB, OVER, with_peak
from theseus_transport import Recipe
from theseus_transport.budget.plan import RUNTIME
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification, ViTModel

SMALL = ModelSizes("llama", 24, 32, 1, 4, 2, 300), ModelSizes("llama", 40, 48, 1, 5, 5, 300)
HEADLESS = partial(ViTModel, add_pooling_layer=False)


def written(root, pair):
    write_random(root / "source", pair[0], dtype=torch.float32)
    write_random(root / "tuned", pair[0], dtype=torch.float32, tune=0.1)
    write_random(root / "target", pair[1], dtype=torch.float32, seed=1)


def padded(root):
    """Four tokens of a row count, and all 128 run."""
    written(root, (ModelSizes("llama", 512, 256, 1, 8, 4, 300), ModelSizes("llama", 768, 256, 1, 12, 4, 300)))
    mask = (torch.arange(128) < 4).long().repeat(256, 1)
    save_file({"input_ids": torch.randint(0, 300, (256, 128)), "attention_mask": mask}, root / "data.safetensors")
    return "--tokens", 1000


def images(root, cls=HEADLESS, **more):
    """50 tokens an image on one side, 785 on the other."""
    for seed, (side, patch, width) in enumerate((("source", 32, 192), ("target", 8, 384))):
        torch.manual_seed(seed)
        sizes = {"hidden_size": width, "intermediate_size": 512, "num_attention_heads": 6, "num_hidden_layers": 1}
        model = cls(ViTConfig(**{**sizes, **more}, image_size=224, patch_size=patch))
        model.save_pretrained(root / side)
        if side == "source":
            with torch.no_grad():
                [parameter.mul_(1.01) for parameter in model.parameters()]
            model.save_pretrained(root / "tuned")
    save_file({"pixel_values": torch.randn(100, 3, 224, 224)}, root / "data.safetensors")
    return "--tokens", 5000, "--batch-size", 1


def classified(root):
    """Of the class token alone once more all moments of the last block, whose MLP is wide."""
    images(root, ViTForImageClassification, intermediate_size=1536)
    return "--tokens", 2500, "--batch-size", 1


def whitened(root):
    """Grams of wide middles, centred, and their powers."""
    written(root, (ModelSizes("llama", 64, 1024, 1, 4, 2, 300), ModelSizes("llama", 96, 2048, 1, 4, 2, 300)))
    save_file({"input_ids": torch.randint(0, 300, (24, 16))}, root / "data.safetensors")
    return "--tokens", 384, "--recipe", "paper", "--center", "--whiten-power", 0.25


def large_file(root):
    """Of which a little is used."""
    written(root, SMALL)
    save_file({"input_ids": torch.randint(0, 300, (40_000, 512))}, root / "data.safetensors")
    return "--tokens", 1000


def other_depths(root):
    """A pass before, to pair blocks."""
    written(root, tuple(replace(g, num_hidden_layers=b) for g, b in zip(SMALL, (3, 2), strict=True)))
    save_file({"input_ids": torch.randint(0, 300, (400, 128))}, root / "data.safetensors")
    return "--tokens", 51_200


def tokenizer(folder, size):
    """One of so many random tokens."""
    alphabet, random = sorted(pre_tokenizers.ByteLevel.alphabet()), Random(0)
    tokens, merges = {token: i for i, token in enumerate(alphabet)}, []
    while len(tokens) < size:
        pair = random.choice(alphabet), random.choice(alphabet)
        if (made := "".join(pair)) not in tokens and len(made) < 16:
            tokens[made] = len(tokens)
            merges.append(pair)
            alphabet.append(made)
    engine = Tokenizer(models.BPE(tokens, merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=engine).save_pretrained(folder)


def records(root):
    """Short ones and a long one, of which many are drawn, and vocabularies of some size."""
    written(root, (replace(SMALL[0], vocab_size=30_000), replace(SMALL[1], vocab_size=30_000)))
    for side in ("source", "target"):
        tokenizer(root / side, 30_000)
    texts = ["The quick brown fox " * 20] * 60_000 + ["jumps over " * 200_000]
    (root / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return "--tokens", 300_000, "--calibration", root / "data.jsonl"


def pictures(root):
    """A large one of 16 bits, and small ones."""
    images(root)
    (root / "pictures").mkdir()
    grey = np.arange(5700, dtype=np.uint16)[:, None].repeat(5700, 1)
    Image.fromarray(grey).save(root / "pictures" / "large.png", compress_level=1)
    for i in range(12):
        Image.new("RGB", (300, 200), (15 * i, 0, 0)).save(root / "pictures" / f"{i}.png")
    return "--tokens", 13 * 50, "--batch-size", 1, "--calibration", root / "pictures"


@pytest.mark.parametrize("kind", [padded, images, classified, whitened, large_file, other_depths, records, pictures])
def test_the_peak_is_what_was_predicted_at_most(kind, tmp_path):
    options = kind(tmp_path)
    folders = [tmp_path / name for name in ("source", "tuned", "target", "out")]
    call = ("transport", *folders, "--calibration", tmp_path / "data.safetensors", *options)
    told, peak = apart(with_peak, *call, "--json", "--no-held-out")
    predicted = json.loads(told)["predicted_bytes"]
    assert peak <= OVER * predicted, f"{peak / MIB:.0f} MiB, predicted {predicted / MIB:.0f}"
    print(f"{kind.__name__}: {peak / MIB:.0f} MiB of {predicted / MIB:.0f}")


WIDE = ModelSizes("llama", 64, 256, 2, 4, 2, 300), ModelSizes("llama", 96, 4096, 2, 4, 2, 300)


def own_peak(job):
    """Bytes that torch holds at most while a job runs, and how many were predicted."""
    session = Session(job)
    return peak_of(session.run), session.plan.peak - RUNTIME


@pytest.mark.parametrize(
    ("tuned", "prior", "offload", "ridge"),
    [
        ("tuned", "none", False, 1e-2),
        ("tuned", "coherent", True, 1e-2),
        ("lora", "none", True, 1e-2),
        ("lora", "coherent", False, 1e-2),
        ("tuned", "none", False, 0),
        ("lora", "coherent", True, 0),
    ],
)
def test_fits_hold_what_was_predicted_at_most(tuned, prior, offload, ridge, tmp_path):
    """Of writers that read a wide middle, beside which all else is little; and not much less than was predicted."""
    written(tmp_path, WIDE)
    write_adapter(tmp_path / "lora", WIDE[0], 8)
    save_file({"input_ids": torch.randint(0, 300, (24, 32))}, tmp_path / "data.safetensors")
    places = (str(tmp_path / name) for name in ("source", tuned, "target"))
    options = {"tokens": 768, "batch_size": 4, "held_out": False, "offload_folder": tmp_path / "s" if offload else None}
    recipe = Recipe("effect", prior=prior, ridge=ridge)
    job = Job(*places, tmp_path / "out", str(tmp_path / "data.safetensors"), recipe=recipe, alpha=1.0, **options)
    held, predicted = apart(own_peak, job)
    assert 0.8 * predicted <= held <= predicted, f"{held / MIB:.0f} MiB, predicted {predicted / MIB:.0f}"
