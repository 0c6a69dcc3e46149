"""What a moved adapter says and saves, so that PEFT reads it on the target: its configuration, and whole tensors."""

from __future__ import annotations

import json
import re

from .adapter import HEADS
from .computed import ComputedUpdate


def adapter_config(update: ComputedUpdate, base_name: str | None) -> str:
    """The source adapter's configuration with the target as its base; ranks and alphas stay.

    Where not all of the adapter moved, or the target's class names its modules otherwise, what moved is listed by name.
    """
    adapter, source, target = update.delta.adapter, update.source_family, update.family
    assert adapter is not None
    config = {**adapter.config, "base_model_name_or_path": base_name, "inference_mode": True, "revision": None}
    keys = adapter.layers()
    as_it_was = {layer: (adapter.rank(layer), adapter.scaling(layer)) for layer in keys}
    depths = {
        base.geometry.depth for base in (update.source, update.target)
    }  # a deeper target has more of the same names
    if len(depths) > 1 or as_it_was != {n: (moved.rank, moved.scaling) for n, moved in update.factors.items()}:
        root = (lambda r: r**0.5) if config.get("use_rslora") else float
        config |= {
            "target_modules": sorted(update.factors),
            "rank_pattern": {layer: moved.rank for layer, moved in update.factors.items()},
            "alpha_pattern": {layer: moved.scaling * root(moved.rank) for layer, moved in update.factors.items()},
            **dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")),
        }
    turned = [any(re.search(p, layer) for p in target.transposed) for layer in update.factors]
    if source is not target and turned:
        config["fan_in_fan_out"] = all(turned)
    saved = {target.canonical(name).rpartition(".")[0] for name in saved_whole(update)}
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


def saved_whole(update: ComputedUpdate) -> dict[str, str]:
    """What a moved adapter saves whole: name as the target's class has it -> the tensor of the target it is made of.

    PEFT reads modules: one of which anything moved is saved with all that the target has in it, no other at all.
    """
    adapter = update.delta.adapter
    assert adapter is not None
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
