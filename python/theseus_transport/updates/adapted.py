"""What a moved adapter says and saves, so that PEFT reads it on the target: its configuration, and whole tensors."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from .adapter import HEADS
from .computed import ComputedUpdate

# of an adapter made of a full tune, beside what is moved
MADE = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "bias": "none", "use_rslora": False}


def adapter_config(update: ComputedUpdate, base_name: str | None) -> str:
    """The source adapter's configuration with the target as its base; of a full tune a new one.

    Where not all of the adapter moved as it was, or the target's class names its modules otherwise, what moved is
    listed by name, with its ranks and alphas.
    """
    adapter, target = update.delta.adapter, update.family
    config: dict[str, Any] = dict(MADE if adapter is None else adapter.config)
    config |= {"base_model_name_or_path": base_name, "inference_mode": True, "revision": None}
    turned = [any(re.search(p, layer) for p in target.transposed) for layer in update.factors]
    saved = {target.canonical(name).rpartition(".")[0] for name in saved_whole(update)}
    kept: set[str] = set()
    if adapter is None:
        config |= _as_moved(update, config) | {"task_type": _task(update, saved), "fan_in_fan_out": all(turned)}
    else:
        source = update.source_family
        as_it_was = {layer: (adapter.rank(layer), adapter.scaling(layer)) for layer in adapter.layers()}
        depths = {base.geometry.depth for base in (update.source, update.target)}
        more = len(depths) > 1  # a deeper target has more of the same names
        if more or as_it_was != {n: (moved.rank, moved.scaling) for n, moved in update.factors.items()}:
            config |= _as_moved(update, config)
        if source is not target and turned:
            config["fan_in_fan_out"] = all(turned)
        asked = {adapter.saves(name): source.canonical(name).rpartition(".")[0] for name in adapter.whole()}
        kept = {entry for entry, module in asked.items() if entry and module in saved and source is target}
    named = {module for module in saved if not any(module.endswith(entry) for entry in kept)}
    config["modules_to_save"] = sorted(kept | {module.rpartition(".")[2] for module in named}) or None
    heads = HEADS.get(str(config.get("task_type")))
    if heads and not any(module.endswith(heads) for module in saved):
        config["task_type"] = None  # else PEFT looks for a head that is not there
    if "ensure_weight_tying" in config:
        config["ensure_weight_tying"] = bool(config["ensure_weight_tying"] and update.shared)
    return json.dumps(config, indent=2, sort_keys=True)


def _as_moved(update: ComputedUpdate, config: Mapping[str, Any]) -> dict[str, Any]:
    """Modules by name, the rank and alpha that most have, and patterns, which not everyone reads, for the others."""
    root = (lambda r: r**0.5) if config.get("use_rslora") else float
    each = {layer: (moved.rank, moved.scaling * root(moved.rank)) for layer, moved in update.factors.items()}
    (rank, alpha), _ = Counter(each.values()).most_common(1)[0] if each else ((config["r"], config["lora_alpha"]), 0)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(update.factors),
        "rank_pattern": {layer: one for layer, (one, _) in each.items() if one != rank},
        "alpha_pattern": {layer: one for layer, (_, one) in each.items() if one != alpha},
        **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
    }


def _task(update: ComputedUpdate, saved: Collection[str]) -> str | None:
    """What PEFT calls the task of the target's class, as far as its tensors tell."""
    family, tensors, stored = update.family, update.target, update.target.tensors
    if family.modality != "text" or family.heads.get("classes") in saved:
        return "SEQ_CLS" if family.modality == "text" else None
    inside = bool(family.prefix) and any(name.startswith(f"{family.prefix}.") for name in stored)
    classes = f"{family.heads.get('classes')}.weight" in tensors
    own = f"{family.heads.get('vocabulary')}.weight" in tensors
    return "CAUSAL_LM" if not classes and (own or (inside and tensors.geometry.tied)) else None


def saved_whole(update: ComputedUpdate) -> dict[str, str]:
    """What a moved adapter saves whole: name as the target's class has it -> the tensor of the target it is made of.

    PEFT reads modules: one of which anything moved is saved with all that the target has in it, no other at all. Of a
    full tune these are heads.
    """
    adapter, heads = update.delta.adapter, set(update.family.heads.values())
    if adapter is None:
        modules = {into.rpartition(".")[0] for into in update.into} & heads
        return {slot.stored: slot.stored for n, slot in update.target.slots.items() if n.rpartition(".")[0] in modules}
    source, same = update.source_family, update.source_family is update.family
    groups: dict[str, list[str]] = {}  # module PEFT saves -> canonical names in it
    for name in adapter.whole():
        if name.rpartition(".")[0] in adapter.parts:
            continue  # the base's own, saved beside its factors
        entry, canonical = adapter.saves(name), source.canonical(name)
        module = canonical.rpartition(".")[0]
        if entry and same:
            parts = canonical.split(".")
            ends = [".".join(parts[:i]) for i in range(1, len(parts))]
            module = next((end for end in ends if end.endswith(entry)), module)
        groups.setdefault(module, []).append(canonical)
    saved: list[str] = []
    for module, names in groups.items():
        moved = [update.moved[name] for name in names if name in update.moved]
        modules = {into.rpartition(".")[0] for into in moved} | ({module} if moved and same else set())
        inside = tuple(f"{module}." for module in modules)
        saved += [slot.stored for name, slot in update.target.slots.items() if name.startswith(inside)]
    found = {stored: stored for stored in saved}
    return found | {head: stored for head, stored in update.shared.items() if stored in found}
