"""Small tokenizers, what calibration knows of a side, and calibration data as it is loaded."""

from pathlib import Path

from theseus_transport.activations.inputs import SideInfo
from theseus_transport.calibration.calibration import load_calibration
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog, then naps.\nÄpfel und Birnen — 3 kg für 5 €.\n" * 300


def make_tokenizer(folder: Path, vocab_size: int, *, begin: bool = False) -> Path:
    """A byte-level BPE trained on TEXT; `begin` puts a <s> before every text, as Llama's does."""
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>"], initial_alphabet=alphabet)
    engine.train_from_iterator([TEXT], trainer)
    if begin:
        engine.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>").save_pretrained(folder)
    return folder


def text_side(folder: Path, name: str = "A", vocab_size: int = 400, **more: int) -> SideInfo:
    return SideInfo(folder=folder, kind="text", name=name, vocab_size=vocab_size, **more)


def load(reference: object, source: SideInfo, target: SideInfo | None = None, **options: int):
    return load_calibration(reference, source, target or source, **({"tokens_wanted": 1, "batch_size": 4} | options))
