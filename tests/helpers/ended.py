"""What tests of embeddings and heads share: small bases, tied and not, a move between two folders, and its error."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers import tiny_models

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS = 300  # of the vocabulary
EXACT = 2e-3  # of float32 maps and weights, as a share of the update's own effect
IDS = torch.randint(0, ROWS, (6, 12), generator=torch.Generator().manual_seed(5))


def llama(cls=LlamaForCausalLM, *, width=24, **options):
    sizes = {"hidden_size": width, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(**{"vocab_size": ROWS, **options}, **sizes, num_hidden_layers=2, max_position_embeddings=64,
                         pad_token_id=0)  # fmt: skip
    return tiny_models.randomised(cls(config))


def build(place):
    """Bases by name, tied and not, of two widths; ids to align them on."""
    torch.manual_seed(0)
    untied = llama(tie_word_embeddings=False)
    tied = llama(tie_word_embeddings=True)
    apart = llama(tie_word_embeddings=False)
    apart.load_state_dict(tied.state_dict())  # the same network, its head a tensor of its own
    wide = {"wide": llama(width=40, tie_word_embeddings=False), "wide-tied": llama(width=40, tie_word_embeddings=True)}
    for name, model in {"untied": untied, "tied": tied, "apart": apart, **wide}.items():
        model.save_pretrained(place / name)
    save_file({"input_ids": torch.randint(0, ROWS, (24, 16))}, place / "ids.safetensors")
    return place


def move(root, out, source, tuned, target, calibration="ids.safetensors", **options):
    job = Job(str(root / source), str(tuned), str(root / target), out, calibration=str(root / calibration), **options)
    return Session(job).run()


def fates(outcome):
    return {row["tensor"]: (row["fate"], row["note"]) for row in outcome.coverage}


@torch.no_grad()
def logits(model, inputs=IDS):
    return model.eval()(inputs).logits.double()


def with_adapter(base, adapter, cls=AutoModelForCausalLM, **options):
    return logits(PeftModel.from_pretrained(cls.from_pretrained(base, **options), adapter))


def error(moved, tuned, base):
    return float((moved - tuned).norm() / (tuned - base).norm())


def adapter(folder, base, cls=AutoModelForCausalLM, **options):
    """A LoRA on q_proj and more, everything in it trained."""
    model = cls.from_pretrained(base, **options.pop("load", {}))
    model = get_peft_model(model, LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **options}))
    for p in {id(p): p for p in model.parameters() if p.requires_grad}.values():
        p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


def saved(folder):
    """Keys of what an adapter saves whole."""
    keys = load_file(folder / "adapter_model.safetensors")
    return sorted(key.removeprefix("base_model.model.") for key in keys if "lora_" not in key)
