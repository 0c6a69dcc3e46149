"""Tiny random models, tunes, adapters and calibration data on disk, for tests that go through files."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.utils import logging

VOCABULARY = 300
TEXT = "the quick brown fox jumps over the lazy dog while 17 zebras look on, and nobody says a word about it.\n"
SIZES = {"source": (24, 4, 2, 32), "target": (40, 5, 5, 48)}  # width, heads, kv heads, MLP
logging.disable_progress_bar()


def llama(side, cls=LlamaForCausalLM, *, depth=2, **options):
    width, heads, kv_heads, middle = SIZES[side]
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = LlamaConfig(**sizes, intermediate_size=middle, num_hidden_layers=depth, vocab_size=VOCABULARY,
                         max_position_embeddings=64, pad_token_id=0, **options)  # fmt: skip
    return randomised(cls(config))


def vit(side, cls=ViTForImageClassification, *, image=8, labels=5):
    width, heads, middle = {"source": (16, 2, 32), "target": (24, 3, 48)}[side]
    config = ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=middle, num_hidden_layers=2,
                       image_size=image, patch_size=4, num_labels=labels)  # fmt: skip
    return randomised(cls(config))


def randomised(model):
    """Every parameter random: gains around 1, the rest around 0."""
    for name, p in model.named_parameters():
        p.data = (0.1 if p.ndim > 1 else 0.2) * torch.randn_like(p) + float("norm" in name and name.endswith("weight"))
    return model.eval()


def tuned(model, size=0.02):
    model = copy.deepcopy(model)
    for p in model.parameters():
        p.data += size * torch.randn_like(p)
    return model


def adapter(folder, base, dtype=torch.float32, **options):
    """A LoRA adapter with nothing at zero, in ``dtype``."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 8, **options}))
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data = 0.1 * torch.randn_like(p)
        if "lora_" in name:
            p.data = p.data.to(dtype)
    model.save_pretrained(folder)


def tokenizer(folder, size):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)


def build(root: Path) -> Path:
    """Everything the tests move, by name; llamas of 2 blocks, ViTs of grids 2 x 2 and 3 x 3."""
    torch.manual_seed(0)
    pairs = {
        "causal": lambda side: llama(side),
        "tied": lambda side: llama(side, tie_word_embeddings=True),
        "bf16": lambda side: llama(side).bfloat16(),
        "bare": lambda side: llama(side, LlamaModel),
        "sequence": lambda side: llama(side, LlamaForSequenceClassification, num_labels=3),
        "image": lambda side: vit(side, image=8 if side == "source" else 12),
        "vision": lambda side: vit(side, ViTModel),
    }
    made = {}
    for name, make in pairs.items():
        for side in SIZES:
            made[name, side] = model = make(side)
            shards = {"max_shard_size": "20KB"} if name == "bf16" else {}
            model.save_pretrained(root / name / side, **shards)
        tuned(made[name, "source"]).save_pretrained(root / name / "tuned", **shards)
    base, images = made["causal", "source"], made["image", "source"]
    adapter(root / "lora", base, target_modules=["q_proj", "v_proj"])
    adapter(root / "patterns", base, target_modules="all-linear", use_rslora=True, alpha_pattern={"q_proj": 5},
            rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 3})  # fmt: skip
    adapter(root / "half", base, torch.bfloat16, target_modules=["q_proj", "lm_head"])
    adapter(root / "named", base, target_modules=r"model\.layers\.\d\.mlp\.(up|down)_proj",
            rank_pattern={"model.layers.0.mlp.up_proj": 2})  # fmt: skip
    score = LlamaForSequenceClassification.from_pretrained(root / "causal" / "source", num_labels=3)
    adapter(root / "score", score, target_modules=["q_proj"], task_type="SEQ_CLS")
    adapter(root / "classes", images, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    save_file({"input_ids": torch.randint(0, VOCABULARY, (24, 16))}, root / "ids.safetensors")
    pixels = torch.randn(40, 3, 12, 12)
    small = pixels[..., 2:10, 2:10].contiguous()
    save_file({"pixel_values": small}, root / "images.safetensors")
    save_file({"source.pixel_values": small, "target.pixel_values": pixels}, root / "both.safetensors")
    (root / "text.txt").write_text(TEXT * 60)
    return root
