"""What a tune's config changed that the forward pass follows: no tensor holds it, so no update carries it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..models.families import FAMILIES
from ..models.loading import config_of

log = logging.getLogger(__name__)
SHOWN = 60  # characters of a value
# of a config, what says how it was trained, is kept, generates or is headed; and what tensors show or rows decide
INERT = (
    *("_*", "architectures", "auto_map", "model_type", "transformers_version", "name_or_path", "tokenizer_class"),
    *(
        "dtype",
        "torch_dtype",
        "quantization_config",
        "attn_implementation",
        "pretraining_tp",
        "chunk_size_feed_forward",
    ),
    *("*dropout*", "*_pdrop", "drop_path_rate", "initializer_*", "*_init", "*_init_value", "layerscale_value"),
    *("gradient_checkpointing", "use_cache", "return_dict*", "use_return_dict", "output_*", "keys_to_ignore*"),
    *("vocab_size", "tie_word_embeddings", "max_position_embeddings", "n_positions", "n_ctx", "*_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type", "classifier_*", "score_*", "finetuning_task", "summary_*"),
    *("task_specific_params", "prefix", "is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_*"),
    *(
        "tie_encoder_decoder",
        "pruned_heads",
        "encoder_stride",
        "pooler_*",
        "projection_dim",
        "use_mask_token",
        "vision_use_head",
    ),
    *("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states", "unsloth_*"),
    *("max_length", "min_length", "do_sample", "early_stopping", "num_beam*", "temperature", "top_k", "top_p"),
    *("typical_p", "*_penalty", "*no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "*suppress_tokens"),
    *("forced_*", "remove_invalid_values"),
)


def warn_of_settings(source: Checkpoint, tuned: Checkpoint) -> None:
    """Name what of a forward pass TUNED's config has otherwise than SOURCE's."""
    if not tuned.config:
        return
    ours, theirs = _followed(source), _followed(tuned)
    other = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if other:
        said = ", ".join(f"{name} {_shown(theirs.get(name))} instead of {_shown(ours.get(name))}" for name in other)
        log.warning(
            "the tune's config changes what its forward pass does: %s; TARGET keeps its own settings, and what was "
            "learnt under others may not carry over", said,
        )  # fmt: skip


def _followed(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of a forward pass, defaults included, nested ones under dotted names."""
    try:
        values = config_of(checkpoint.folder).to_dict()
    except InputRefused:  # a family of the user's own
        values = checkpoint.config
    if (kind := values.get("model_type")) in FAMILIES:
        values = FAMILIES[kind].geometry(values)
    return dict(_flat(values))


def _flat(values: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if any(fnmatchcase(name, pattern) for pattern in INERT):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{name}.")
        elif value is not None:
            yield f"{start}{name}", json.loads(json.dumps(value, default=str))  # a list and a tuple are the same


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)[:SHOWN]
