"""Bugs to plant, one at a time, each with the test that must turn red. A bug that no test sees is a missing test."""

from dataclasses import dataclass

from calibrating import CALIBRATION_BUGS
from choices import CHOICE_BUGS
from effects import EFFECT_BUGS
from fits import FIT_BUGS
from hostile import HOSTILE_BUGS
from numerics import NUMBER_BUGS
from records import RECORD_BUGS
from stream import STREAM_BUGS


@dataclass(frozen=True)
class Bug:
    """Replace ``old``, which ``file`` of the packages holds exactly once, by ``new``; ``test`` is a pytest node id."""

    name: str
    test: str
    file: str
    old: str
    new: str


def llama(pair: str, kind: str = "linear") -> str:
    return f"tests/exact/test_llama.py::test_exact[llama-{pair}-{kind}]"


def vit(pair: str, kind: str = "linear") -> str:
    return f"tests/exact/test_vit.py::test_exact[vit-{pair}-{kind}]"


def family(pair: str, kind: str) -> str:
    return f"tests/exact/test_families.py::test_exact[{pair}-{kind}]"


def adapter(pair: str) -> str:
    return f"tests/exact/test_adapter.py::test_adapter_is_exact[{pair}-lora]"


def presumed(case: str) -> str:
    return f"tests/updates/test_presumed.py::test_presuming_changes_nothing[{case}]"


def stopped(case: str) -> str:
    return f"tests/recipes/test_solver.py::test_a_run_that_stops_after_every_block_plans_the_same_bits[{case}]"


ONE_TOKEN = "tests/activations/test_one_token.py"
LAST_BLOCK = f"{ONE_TOKEN}::test_the_last_block_is_compared_by_its_class_token_and_its_keys_by_all"
ELSEWHERE = "tests/updates/test_layer_moves_device.py::test_nothing_is_computed_elsewhere"


def own_output(part: str, indent: int) -> str:
    """Lines that make a map from a layer's own output."""
    line = " " * indent
    return (
        f'{line}seen = self.moments[f"{{b}}.{part}"]'
        ".derive(self.source.augmented(own.name), self.target.augmented(layer.name))\n"
        f"{line}self.ruleset.add(layer.name, self.polar(seen.cross), seen.count)\n{line}"
    )


HEADS, SOLVER, STORED = (
    f"theseus_transport/{name}.py" for name in ("recipes/coherent_heads", "recipes/solver", "alignment/stored_maps")
)
CAPTURE, COHERENT, DEPTH, FAMILIES, FAMILY, LINKS, MAPS, MODELS = (
    f"theseus_transport/{name}.py"
    for name in (
        "activations/capture",
        "recipes/coherent",
        "alignment/block_pairing",
        "models/families",
        "models/family",
        "activations/links",
        "recipes/maps",
        "models/tensors",
    )
)
MOMENTS, MOVES, OPENED, OUTPUT, OWN, PAIRING, PAPER, PIECES, PROCRUSTES = (
    f"theseus_transport/{name}.py"
    for name in (
        "activations/moments",
        "updates/layer_moves",
        "models/open_attention",
        "updates/output",
        "integrations/own",
        "recipes/head_pairing",
        "recipes/paper",
        "updates/fused_factors",
        "linalg/procrustes",
    )
)
BATCHES, POLAR = "theseus_transport/activations/pairing_tokens.py", "theseus_transport/linalg/polar.py"
MERGED = "theseus_transport/merged.py"
CERTIFICATE = "theseus_transport/linalg/certificate.py"
RECIPES, REGRESSION, TOKENS, TRANSPORT, UPDATE, VECTORS, VISION, WHITENING = (
    f"theseus_transport/{name}.py"
    for name in (
        "recipes/ruleset",
        "recipes/regression",
        "activations/row_mixing",
        "updates/transport",
        "updates/update",
        "updates/vector_moves",
        "models/vision_families",
        "linalg/whitening",
    )
)

# fmt: off
BUGS = [
    # --- norms -------------------------------------------------------------------------------------------------------
    Bug("gains of norms not folded", llama("identity-new-gains"), RECIPES,
        "    fold: bool = True\n", "    fold: bool = False\n"),
    Bug("gain not unfolded at the target", llama("identity-new-gains"), MOVES,
        "gain, shift, scale = self._unfolding(*d_weight.shape)\n",
        "gain, shift, scale = self._unfolding(*d_weight.shape)\n        gain = torch.ones_like(gain)\n"),
    Bug("bias of the norm not folded", vit("identity-new-gains"), MOVES,
        "scale * (b + w @ shift)", "scale * b"),
    Bug("bias of the target's norm not unfolded", vit("identity-new-gains"), MOVES,
        '"bias": d_bias / scale - d_weight @ shift}', '"bias": d_bias / scale}'),
    Bug("bias change of a reader without bias dropped", vit("identity-no-qkv-bias"), MOVES,
        "    if bool(rest.any()):\n", "    if False:\n"),
    Bug("z read without the norm's bias", vit("identity-new-gains"), MOMENTS,
        "        n = float(self.count)\n        (gain_s",
        "        n = float(self.count)\n        source, target = ((g, 0 * b) for g, b in (source, target))\n"
        "        (gain_s"),
    Bug("tied head folded", llama("tied", "everything"), "theseus_transport/models/base.py",
        "slots.pop(f\"{geometry.family.heads.get('vocabulary')}.weight\", None)",
        'slots["lm_head.weight"] = slots["embed_tokens.weight"]'),
    Bug("final norm's own change dropped", llama("tied", "gains"), MOVES,
        "    return target * torch.where(share > 0, mixed", "    return 0 * target * torch.where(share > 0, mixed"),

    # --- maps --------------------------------------------------------------------------------------------------------
    Bug("T_in and T_out swapped where both are square", vit("rotated"), MOVES,
        "half = self.read(change[0])\n        del change\n"
        "        write = self.write  # once: it may be read from a file\n"
        "        d_bias = self.rule.scale_out * write(bias)\n        d_weight = write(half.T).T\n",
        'first, last = (self.write, self.read) if self.into.role == "output" else (self.read, self.write)\n'
        "        half, write = first(change[0]), self.write\n        d_bias = self.rule.scale_out * write(bias)\n"
        "        d_weight = last(half.T).T\n"),
    Bug("map transposed", llama("rotated"), MAPS,
        "return rows @ self.matrix.to(rows)", "return rows @ self.matrix.to(rows).T"),
    Bug("expanding layers mapped by their own output", llama("up-times-3"), COHERENT,
        '            return Rule(own.name, f"{b}.mlp", f"{b}.middle", self._whitened, scale)',
        own_output("mlp", 12) + 'return Rule(own.name, f"{b}.mlp", layer.name, self._whitened, scale)'),
    Bug("rank of neurons read off their covariance", llama("massive-neuron"), COHERENT,
        "            polar = self.polar(middle.cross, energies=(middle.source_energy, middle.target_energy))\n",
        "            from ..linalg.procrustes import procrustes\n\n            polar = procrustes(middle.cross, floor=1e-6)\n"),
    Bug("residual writers mapped by their own output", vit("rotated"), COHERENT,
        '                return Rule(own.name, f"{b}.context", f"{b}.mlp", 1.0, self._written(layer.name))',
        own_output("context", 16)
        + 'return Rule(own.name, f"{b}.context", layer.name, 1.0, self._written(layer.name))'),
    Bug("dense maps for queries and keys", llama("turned-in-heads"), COHERENT,
        '                return Rule(own.name, reads, f"{b}.{layer.role}", self._whitened)',
        own_output("attention", 16) + 'into = f"{b}.value" if layer.role == "value" else layer.name\n'
        "                return Rule(own.name, reads, into, self._whitened)"),
    Bug("queries and keys mapped like values", llama("turned-in-heads"), HEADS,
        "    t_shared = procrustes(shared,", "    t_shared = procrustes(paired,"),
    Bug("a block's last layer writes the block's own space", llama("rank-poor-vocabulary"), COHERENT,
        "after = self.pairs.after(b)", 'after = f"{b}.attention"'),
    Bug("heads paired by index", llama("permuted"), PAIRING,
        "    score = similarity(context, heads)\n", "    score = torch.eye(*heads, dtype=torch.float64)\n"),
    Bug("groups of heads paired by index", llama("permuted"), PAIRING,
        "    kv, *_ = _assign(quality)\n", "    kv = torch.arange(kv_heads[1]) % kv_heads[0]\n"),
    Bug("completion left out", llama("rank-poor-vocabulary", "everything"), COHERENT,
        'if self.recipe.completion == "deeper" and (name', "if False and (name"),
    Bug("embeddings moved without a map", llama("rotated", "everything"), COHERENT,
        'Rule(name, "identity", output, 1.0, self._written(',
        'Rule(name, "identity", "identity", 1.0, self._written('),
    Bug("mean of a tied table dropped", family("gpt2-tied", "everything"), "theseus_transport/recipes/coherent.py",
        "if token and target.tied and self._layer_norm and behind in self.ruleset.maps:", "if False:"),
    Bug("blocks paired off by one", llama("two-blocks-more"), DEPTH,
        "found[j] = i\n", "found[j] = max(i - 1, 0)\n"),
    Bug("blocks paired greedily", "tests/alignment/test_block_pairing.py::test_the_pairing_is_the_best_of_all", DEPTH,
        "        if best[i, j] == best[i, j - 1]:\n", "        if j > i and best[i, j] == best[i, j - 1]:\n"),
    Bug("sizes of what blocks add counted", "tests/alignment/test_block_pairing.py::test_likeness_ignores_turns_and_sizes", DEPTH,
        "nuclear / size.clamp(min=torch.finfo(size.dtype).tiny)", "nuclear"),
    Bug("spaces of another source block compared", llama("two-blocks-more"), LINKS,
        "Link(source.space(own, part), target", "Link(source.space(min(b, source.depth - 1), part), target"),
    Bug("space behind a block taken from the block before", llama("shallower"), LINKS,
        "Link(source.after(own), target.after(b))", "Link(source.after(max(own - 1, 0)), target.after(b))"),
    Bug("what follows a block taken for a neighbour's", "tests/alignment/test_block_pairing.py::test_what_follows_a_block_is_compared"
        "_with_what_follows_its_source", LINKS, "and self.blocks[b + 1] == own + 1 else", "else"),
    Bug("class token mixed with all the rest", f"{LAST_BLOCK}[vit]", CAPTURE,
        'activation.detach()[:, 0].clone() if space.rows == "class" else activation', "activation"),
    Bug("class tokens mixed as patches are", f"{LAST_BLOCK}[clip]", CAPTURE,
        "self._mixings if self.links[name].whole else", "self._mixings if True else"),
    Bug("energies of rows that nothing reads", f"{LAST_BLOCK}[vit]", LINKS, "link.of_class if alone else link", "link"),
    Bug("few class tokens lean on nothing", family("clip-three-images", "linear"), COHERENT,
        "self.polar(leaning(self._read(name).cross, polar.map))", "self.polar(self._read(name).cross)"),
    Bug("few class tokens of a head lean on nothing", family("clip-three-images", "linear"), HEADS,
        "procrustes(leaning(of_group(paired(alone)), t_context.map),", "procrustes(of_group(paired(alone)),"),
    Bug("class token read where an earlier block feeds", f"{ONE_TOKEN}::test_one_token_is_read_only_where_both_last_blocks_pair",
        LINKS, "and self.blocks[b] == self.source.depth - 1\n", "and self.blocks[b] is not None\n"),
    Bug("class token read of a model without its head", f"{ONE_TOKEN}::test_all_rows_matter_without_such_a_head[vit without its "
        "classifier]", FAMILY, "return bool(heads) and any(", "return bool(heads) or any("),
    Bug("register tokens of one side counted", family("dino-registers-added", "linear"), BATCHES,
        "tokens.select(kept[1].repeat(samples))", "tokens.select(kept[1].repeat(samples).roll(1))"),

    # --- families ----------------------------------------------------------------------------------------------------
    Bug("factor behind a writer not folded", family("dino-new-scales", "linear"), MOVES,
        "return w.mul_(scale[:, None]).mul_(gain), b", "return w.mul_(gain), b"),
    Bug("factor behind a writer not unfolded", family("dino-new-scales", "linear"), MOVES,
        "            d_weight.div_(gain).div_(scale[:, None])\n", "            d_weight.div_(gain)\n"),
    Bug("change of a factor behind a writer dropped", family("dino-new-scales", "gains"), MOVES,
        'scale = part(f"{factor}",', 'scale = source.vector(f"{factor}",'),
    Bug("gain of a norm inside heads dropped", family("qwen3-flipped-in-heads", "gains"), LINKS,
        "if all(names):", "if False:"),
    Bug("Conv1D read as [out, in]", family("gpt2-new-gains", "linear"), "theseus_transport/models/text_families.py",
        r'transposed=(r"\.c_attn$", r"\.c_proj$",', r'transposed=(r"\.c_attn$",'),
    Bug("chunks of a fused layer in another order", family("gpt2-turned-in-heads", "gains"), "theseus_transport/models/text_families.py",
        '("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v")', '("attn.c_attn.q", "attn.c_attn.v", "attn.c_attn.k")'),
    Bug("norm in front of the first block left", family("clip-new-gains", "gains"), LINKS,
        "        if source.embedding_norm and target.embedding_norm:\n", "        if False:\n"),
    Bug("parts of a fused layer in reverse", "tests/updates/test_layer_moves.py::test_a_part_of_a_stored_tensor", FAMILY,
        "rows.chunk(self.parts)[self.part]", "rows.chunk(self.parts)[-1 - self.part]"),
    Bug("part of a fused output taken from another", family("gpt2-turned-in-heads", "gains"), CAPTURE,
        "output.chunk(slot.parts, -1)[slot.part]", "output.chunk(slot.parts, -1)[-1 - slot.part]"),
    Bug("key and value of in_proj exchanged", family("open-clip-turned-in-heads", "gains"), VISION,
        '"attn.in_proj.k", "attn.in_proj.v")}', '"attn.in_proj.v", "attn.in_proj.k")}'),
    Bug("transposed weight not turned", "tests/updates/test_layer_moves.py::test_a_part_of_a_stored_tensor", FAMILY,
        "rows = stored.mT if self.transposed and stored.ndim == 2 else stored", "rows = stored"),
    Bug("transposed weight not turned back", family("gpt2-new-gains", "linear"), "theseus_transport/updates/computed.py",
        "self.target.slots[part].view(value)",
        "(value if len({*value.shape, 2, 0}) == 3 and self.target.slots[part].transposed\n"
        "                     else self.target.slots[part].view(value))"),
    Bug("parts of a fused update in another order", family("gpt2-turned-in-heads", "gains"), "theseus_transport/updates/computed.py",
        "self.target.slots[part].view(value)",
        "(lambda s: type(s)(s.stored, s.parts - 1 - s.part, s.parts, s.transposed))("
        "self.target.slots[part]).view(value)"),
    Bug("positions taken by index", "tests/updates/test_layer_moves.py::test_positions_follow_the_grid", VECTORS,
        'if target.family.modality == "vision":', "if False:"),
    Bug("class token's position interpolated too", "tests/updates/test_layer_moves.py::test_positions_follow_the_grid", VECTORS,
        "mixed[into:, own:] = grid(", "mixed[into - 1 : -1, own:] = grid("),
    Bug("mask of MultiheadAttention ignored", "tests/models/test_open_attention.py::test_same_output", OPENED,
        "q, k, v, attn_mask=attn_mask,", "q, k, v, attn_mask=None,"),
    Bug("bool mask of MultiheadAttention read the other way", "tests/models/test_open_attention.py::test_same_output", OPENED,
        "            attn_mask = ~attn_mask ", "            pass "),
    Bug("tokens and batch of MultiheadAttention exchanged", "tests/models/test_open_attention.py::test_same_output", OPENED,
        "rows = query if self.batch_first else query.transpose(0, 1)", "rows = query"),
    Bug("heads of MultiheadAttention masked in another order", "tests/models/test_open_attention.py::test_same_output", OPENED,
        "attn_mask.unflatten(0, (-1, self.heads))", "attn_mask.unflatten(0, (self.heads, -1)).transpose(0, 1)"),
    Bug("attention over other tokens taken for self-attention",
        "tests/models/test_open_attention.py::test_anything_else_is_the_originals", OPENED,
        "query is not key or key is not value or", "query is not key or"),

    # --- scales ------------------------------------------------------------------------------------------------------
    Bug("no scale from energies", llama("up-times-3"), HEADS,
        "    return math.sqrt(target / source) if", "    return 1.0 if"),
    Bug("scale of z dropped", llama("widened"), COHERENT,
        "self._whitened = math.sqrt(ratio) if", "self._whitened = 1.0 if"),
    Bug("s_out dropped", llama("widened-rescaled"), MOVES,
        "d_weight *= self.rule.scale_out / self.rule.scale_in", "d_weight *= 1 / self.rule.scale_in"),
    Bug("s_in dropped", llama("widened"), MOVES,
        "d_weight *= self.rule.scale_out / self.rule.scale_in", "d_weight *= self.rule.scale_out"),
    Bug("bias unscaled", vit("rotated", "gains"), MOVES,
        "d_bias = self.rule.scale_out * write(bias)", "d_bias = write(bias)"),
    Bug("residual writers scaled with the mean over features", vit("rotated"), COHERENT,
        "own = energy.centred if self._layer_norm else", "own = energy.centred if False else"),
    Bug("expanding layers scaled by h", llama("up-times-3"), COHERENT,
        "scale_of(float(seen.source[alive[0]].sum()), float(seen.target[alive[1]].sum()), self.recipe)",
        "scale_of(float(energies[0].sum()), float(energies[1].sum()), self.recipe)"),
    Bug("silent neurons counted", llama("silent-gate"), COHERENT,
        "alive = [x > self.recipe.floor**2 * x.max() for x", "alive = [x > -1 for x"),
    Bug("copies of a head read in full", llama("one-query-copied"), HEADS,
        "1 / _ratios(e_context, recipe), share)", "1 / _ratios(e_context, recipe), fit)"),
    Bug("regression at the input only", "tests/updates/test_layer_moves.py::test_regression_scales_by_what_a_map_predicts",
        REGRESSION, "scale_out=rule.scale_out * outer", "scale_out=rule.scale_out"),
    Bug("regression at the output only", "tests/updates/test_layer_moves.py::test_regression_scales_by_what_a_map_predicts",
        REGRESSION, "scale_in=rule.scale_in / inner", "scale_in=rule.scale_in"),
    Bug("regression of a writer with the mean over features",
        "tests/updates/test_layer_moves.py::test_regression_scales_by_what_a_map_predicts", REGRESSION,
        "energies = (totals[0], totals[1]) if writes else", "energies = (totals[0], totals[1]) if False else"),
    Bug("context read without its scale", llama("scaled-heads"), HEADS,
        "by_query(t_context, 1 / _ratios(e_context, recipe),",
        "by_query(t_context, 1 + 0 * _ratios(e_context, recipe),"),
    Bug("values scaled like keys", llama("scaled-heads"), HEADS,
        "energies((value.source, value.target),", "energies((key.source, key.target),"),

    # --- block by block ----------------------------------------------------------------------------------------------
    Bug("sum over depth forgotten between processes", stopped("llama-few-coherent"), SOLVER,
        'held(n) if n in tensors else None for n in ("together", "toward")', 'None for n in ("together", "toward")'),
    Bug("Grams forgotten between processes", stopped("llama-whitened"), SOLVER,
        "for i in range(3) if", "for i in range(1) if"),
    Bug("maps of the end dropped with their block", stopped("tied-coherent"), SOLVER,
        "is None or b >= self.ahead} | self._starts()", "is None or b >= self.ahead}"),
    Bug("blocks that are not visited never planned",
        "tests/recipes/test_registry.py::test_a_job_and_a_stored_alignment_move_the_same[paper]", SOLVER,
        "if b is not None and b >= self.ahead):\n            self.block(b)", "if False):\n            self.block(b)"),
    Bug("keys planned without their queries",
        "tests/recipes/test_solver.py::test_a_layer_by_itself_needs_what_it_says_and_no_less[llama-few-regression]", COHERENT,
        "(QKV[:2] if shared else", "((role,) if shared else"),
    Bug("the first map's rank read off one of two",
        "tests/recipes/test_solver.py::test_a_layer_by_itself_needs_what_it_says_and_no_less[clip-few-coherent]", COHERENT,
        'return self._starts() if self.recipe.completion == "deeper" else {name}', "return {name}"),
    Bug("moments held beyond their block", "tests/recipes/test_solver.py::test_moments_go_with_their_block[llama-coherent]",
        COHERENT, "return b >= self.ahead and not", "return b >= 0 and not"),
    Bug("an input that waits never fitted", "tests/recipes/test_solver.py::test_an_input_that_waits_for_its_map_is_fitted",
        COHERENT, 'rule.input == f"{name}.completed"', "rule.input == name"),
    Bug("what follows the last block met twice over",
        "tests/recipes/test_solver.py::test_every_link_arrives_once_and_moments_in_the_order_of_a_pass[llama]", LINKS,
        "if left.pop(name, 0) is None]", "if name in left]"),
    Bug("factors of a planned map exchanged",
        "tests/recipes/test_solver.py::test_maps_are_known_before_they_are_made[llama-paper]", PAPER,
        '/right", (k, out_t))', '/right", (out_t, k))'),
    Bug("all maps read at once", "tests/recipes/test_solver.py::test_maps_are_read_when_they_are_asked_for", STORED,
        "self._read = lru_cache(maxsize=KEPT)(self._from_disk)",
        "self._read = {name: self._from_disk(name) for name in kinds}.__getitem__"),

    # --- adapters ----------------------------------------------------------------------------------------------------
    Bug("bias of the norm lost behind factors", adapter("vit-identity-new-gains"), MOVES,
        "if self.rule.fold and bool(rest.any()):\n", "if False:\n"),
    Bug("gain of the source not folded into A", adapter("llama-identity-new-gains"), MOVES,
        "self.read(a * gain_s)", "self.read(a)"),
    Bug("rslora ignored", "tests/updates/test_delta.py::test_products_are_pefts[rslora]", "theseus_transport/updates/adapter.py",
        'if self.config.get("use_rslora") else', "if False else"),
    Bug("rank pattern ignored", "tests/updates/test_delta.py::test_products_are_pefts[rank-pattern]", "theseus_transport/updates/adapter.py",
        '_by_pattern(self.config.get("rank_pattern"), layer, self.config["r"])', 'self.config["r"]'),
    Bug("patterns match anywhere in a name", "tests/updates/test_delta.py::test_products_are_pefts[near-misses]", "theseus_transport/updates/adapter.py",
        'regex.match(rf"(.*\\.)?({pattern})$", layer, timeout=PATIENCE)', "regex.search(pattern, layer)"),
    Bug("trained magnitudes ignored", "tests/updates/test_merged.py::test_merged_is_what_peft_runs[dora]", "theseus_transport/updates/merged.py",
        'if "lora_magnitude_vector" not in parts:', "if True:"),
    Bug("tokens trained at other rows", "tests/updates/test_merged.py::test_merged_is_what_peft_runs[tokens]", "theseus_transport/updates/merged.py",
        "index[inside] - rows.start] = trained[inside]", "index[inside] - rows.start] = trained[inside].flip(0)"),
    Bug("names of wrappers kept", "tests/updates/test_spellings.py::test_a_full_tune_under_any_spelling_is_the_tune[module.]",
        FAMILY, "unwrapped(name).removeprefix(", "name.removeprefix("),
    Bug("product of the factors unscaled", "tests/updates/test_transport.py::test_factors_and_their_product_move_alike",
        PIECES, "@ f.a).mul_(f.scaling)}", "@ f.a)}"),
    Bug("alpha in both factors", "tests/updates/test_update.py::test_peft_loads_the_moved_adapter[plain]", OUTPUT,
        '1.0 if part == "a" else update.alpha', "update.alpha"),
    Bug("factors of fused parts in another order", "tests/updates/test_layer_moves.py::test_factors_of_a_fused_layer", PIECES,
        "piece.place.part * rows", "(parts - 1 - piece.place.part) * rows"),
    Bug("factors of fused layers one over the other", "tests/updates/test_layer_moves.py::test_factors_of_a_fused_layer", PIECES,
        "            start = span.stop\n", "            pass\n"),
    Bug("scale of the first fused layer for all", "tests/updates/test_layer_moves.py::test_factors_of_a_fused_layer", PIECES,
        "moved.b * (piece.scaling / first.scaling)", "moved.b"),
    Bug("first part of a fused B moved for all",
        "tests/exact/test_families.py::test_adapter_is_exact[gpt2-rotated-lora]", TRANSPORT,
        "factors.b.chunk(slot.parts)[slot.part]", "factors.b.chunk(slot.parts)[0]"),

    # --- paper ------------------------------------------------------------------------------------------------------
    Bug("whitened on one side only", "tests/linalg/test_whitening.py::test_whole_whitening_leaves_correlations", WHITENING,
        "return left @ cross.double() @ right", "return left @ cross.double()"),
    Bug("Grams left uncentred", "tests/linalg/test_whitening.py::test_centring_is_of_the_rows_and_comes_first", PAPER,
        "moment.centred(), grams and {side: gram.centred() for side, gram in grams.items()}",
        "moment.centred(), grams"),
    Bug("parts of in_proj in reverse", "tests/integrations/test_drop_in.py::test_fused_attention_equals_split_and_is_put_back", OWN,
        'Tap(module, "out", i, parts)', 'Tap(module, "out", parts - 1 - i, parts)'),
    Bug("proj read as [out, in]", "tests/integrations/test_drop_in.py::test_towers_against_hooks_and_svds[cls-False-wider]", OWN,
        '(Tap("", "out"),), transposed=True)', '(Tap("", "out"),), transposed=False)'),

    # --- moments and mixings -----------------------------------------------------------------------------------------
    Bug("mask ignored", "tests/activations/test_capture.py::test_masked_tokens_have_no_influence", BATCHES,
        "chosen = tokens.select(mask.cpu())", "chosen = tokens.select(torch.ones_like(mask.cpu()))"),
    Bug("hooks left behind after an error", "tests/activations/test_capture.py::test_models_are_as_they_were", CAPTURE,
        "stack.callback(handle.remove)", "stack.callback(lambda h=handle: self._seen and h.remove())"),
    Bug("evaluation mode left behind", "tests/activations/test_capture.py::test_models_are_as_they_were",
        "theseus_transport/models/forward.py", "            module.training = training\n", "            pass\n"),
    Bug("samples of two tokenizers mixed", "tests/activations/test_capture.py::test_text_of_two_tokenizers_is_mixed_by_characters",
        BATCHES, "columns.append(mixing.column + i * width)", "columns.append(mixing.column)"),
    Bug("energies of masked tokens counted", "tests/activations/test_capture.py::test_masked_tokens_have_no_influence", MOMENTS,
        "strict=True)), (mixing, mixing))", "strict=True)), (None, None))"),
    Bug("samples of a batch mixed", "tests/activations/test_row_mixing.py::test_batched_mixes_every_sample_alone", TOKENS,
        "column = (self.column + self.tokens * start[:, None])", "column = (self.column + self.rows * start[:, None])"),
    Bug("tokens counted instead of rows", "tests/activations/test_moments.py::test_mixing_on_either_side", MOMENTS,
        "len(target) if target_mixing is None else target_mixing.rows", "len(source)"),
    Bug("outputs' moment without biases", "tests/activations/test_moments.py::test_derive_is_the_moment_of_the_outputs", MOMENTS,
        "    last[0, -1] = 1\n", ""),

    # --- polar factor ------------------------------------------------------------------------------------------------
    Bug("noise counted as rank", "tests/linalg/test_procrustes.py::test_default_floor_is_not_moved_by_rounding", PROCRUSTES,
        "FLOOR = 1e-6", "FLOOR = 1e-12"),
    Bug("certificate accepts T = 0", "tests/linalg/test_procrustes.py::test_certificate_rejects_zero_whatever_rank_it_claims",
        CERTIFICATE,
        "left_out = 2 * floor * scale", "left_out = scale + 2 * floor * scale"),
    Bug("certificate accepts reflections", "tests/linalg/test_procrustes.py::test_certificate_rejects", CERTIFICATE,
        "torch.linalg.cholesky_ex(shifted)[1] != 0, 0.5)", "torch.linalg.cholesky_ex(shifted)[1] != 0, 2)"),
    Bug("iteration keeps what lies below the floor", "tests/linalg/test_polar.py::test_tail_of_small_singular_values", POLAR,
        "    _apply(projector, x)\n", ""),
    Bug("rational steps so bold that rounding shows", "tests/linalg/test_polar.py::test_scaled_residuals", POLAR,
        "GENTLE = 1e-2", "GENTLE = 1e-5"),
    Bug("bound of the largest singular value too low", "tests/linalg/test_polar.py::test_scaled_residuals", POLAR,
        "matrix_norm(gram @ gram).sqrt().sqrt()", "matrix_norm(gram @ gram).sqrt().sqrt() / 2"),
    Bug("iterated map kept though its certificate failed",
        "tests/linalg/test_polar.py::test_a_failed_certificate_starts_lower_then_leaves_it_to_lapack", PROCRUSTES,
        "            _check_finite(c)\n", "            return result\n"),
    Bug("a device asked before the certificate",
        "tests/linalg/test_polar.py::test_a_device_is_not_waited_for_before_the_certificate", PROCRUSTES,
        "    if not (iterate and device):\n", "    if True:\n"),
    Bug("a device asked whether an inverse went well", "tests/linalg/test_polar.py::test_no_value_is_read_on_the_host[rational-sign]",
        POLAR, "    if not remote(z):\n", "    if True:\n"),
    Bug("largest eigenvalue after a few steps",
        "tests/linalg/test_polar.py::test_the_largest_eigenvalue_is_found_to_a_percent", POLAR,
        "range(48)", "range(4)"),
    Bug("comparable features of a device not counted",
        "tests/linalg/test_polar.py::test_a_device_counts_comparable_features", PROCRUSTES,
        "return found if least <= int(found.rank) else", "return found if True else"),
    Bug("rank by rotations without the floor", "tests/linalg/test_polar.py::test_a_device_finds_what_lapack_finds",
        PROCRUSTES, "        kept = s > floor * _first(s)\n        yield", "        kept = s > 0\n        yield"),
    Bug("a device completes what is determined already", "tests/linalg/test_polar.py::test_a_device_completes_as_lapack_does",
        PROCRUSTES, "    rest -= (rest @ t.mT) @ t\n", ""),
    Bug("a device asked for every energy",
        "tests/activations/test_moments.py::test_nothing_waits_for_a_device_while_tokens_are_added", MOMENTS,
        "+= moment.source_energy.sum() - ", "+= float(moment.source_energy.sum()) - "),
    Bug("outputs that wait forgotten", "tests/activations/test_capture.py::test_spaces_added_together_are_those_added_alone",
        CAPTURE, "                run()\n                self._flush_outputs()\n", "                run()\n"),
    Bug("Grams of the target mixed like the source",
        "tests/activations/test_capture.py::test_grams_follow_their_own_mixing", CAPTURE,
        "for name in own], twice, (mixing, mixing))", "for name in own], twice, self._mixings)"),
    Bug("heads fetched before they are decomposed",
        "tests/recipes/test_head_pairing.py::test_a_device_decomposes_heads_where_they_lie", "theseus_transport/recipes/head_pairing.py",
        ".transpose(1, 2)\n    energies", ".transpose(1, 2).cpu()\n    energies"),

    # --- fates -------------------------------------------------------------------------------------------------------
    Bug("a changed tensor without a rule dropped", "tests/updates/test_update.py::test_tuned_models_that_do_not_fit", TRANSPORT,
        """raise InputRefused(f"{name} changed but has no rule; {leaving_alone(self.update, name)}")""",
        'self._decide(name, "unchanged")'),
    Bug("alpha ignored", "tests/updates/test_transport.py::test_transport_is_linear", "theseus_transport/updates/computed.py",
        "into.copy_((piece * strength).to(into.dtype))", "into.copy_(piece)"),
    Bug("head of other classes moved", "tests/updates/test_transport.py::test_every_tensor_has_one_fate", TRANSPORT,
        'if move.own.role == "head" and rows[0] != rows[1]:', "if False:"),
    Bug("zero gain of the target divided by", "tests/updates/test_update.py::test_a_zero_gain_of_the_target_is_named", MOVES,
        "if bool((values == 0).any()):", "if False:"),
    Bug("change of a norm not folded into its readers", llama("rotated", "gains"), TRANSPORT,
        "& self.changed if rule.fold else set()", "& set() if rule.fold else set()"),

    # --- moves on a device -------------------------------------------------------------------------------------------
    Bug("a job's moves on the CPU", "tests/updates/test_layer_moves_device.py::test_a_job_moves_on_its_device",
        "theseus_transport/jobs/prepared.py", "leave=job.leave, device=job.device, **how)", "leave=job.leave, **how)"),
    Bug("weights converted before they cross", f"{ELSEWHERE}[llama-full-coherent-torch.bfloat16]", MODELS,
        "return tensor.detach().to(device).to(torch.float64, copy=True)",
        "return tensor.detach().to(torch.float64, copy=True).to(device)"),
    Bug("factors moved on the CPU", f"{ELSEWHERE}[llama-factors-coherent-torch.float32]", MOVES,
        "(double(factor, self.source.device) for", "(double(factor) for"),
    Bug("a gain's map made on the CPU", f"{ELSEWHERE}[llama-without-head-coherent-torch.float32]", MOVES,
        "torch.eye(width, dtype=torch.float64, device=device)", "torch.eye(width, dtype=torch.float64).to(device)"),
    Bug("an update leaves the device in float64", f"{ELSEWHERE}[llama-full-coherent-torch.float32]", "theseus_transport/updates/computed.py",
        "(piece * strength).to(into.dtype)", "piece * strength"),
    Bug("T_out held while T_in is used", "tests/updates/test_layer_moves_device.py::test_the_device_holds_what_is_predicted", MOVES,
        "        half = self.read(change[0])\n", "        early = self.write\n        half = self.read(change[0])\n"),

    # --- presumed changes, late rules, tiles -------------------------------------------------------------------------
    Bug("what did not change moves", presumed("whole-gpt2-5-delta"), "theseus_transport/updates/computed.py",
        "if not computation.sources <= self.unchanged\n", "if computation\n"),
    Bug("a bias the target cannot take decides", presumed("whole-no-bias-5-checkpoint"), TRANSPORT,
        "({weight, bias} if takes_bias else {weight})", "{weight, bias}"),
    Bug("presumed coverage told as final", presumed("whole-llama-5-checkpoint"), "theseus_transport/updates/computed.py",
        'TensorFate(told.tensor, "unchanged") if told.tensor in same else', ""),
    Bug("rules looked up at planning", presumed("whole-llama-1-checkpoint"), MOVES,
        "return self.available.rules[self.into.name]",
        'return self.__dict__.setdefault("early", self.available.rules.get(self.into.name))'),
    Bug("what does not move goes through arithmetic", "tests/updates/test_presumed.py::test_what_does_not_move_keeps_its_bits",
        OUTPUT, "        return base.to(dtype)\n", "        return (base + 0.0).to(dtype)\n"),
    Bug("tensors compared by their first row",
        "tests/updates/test_presumed_reads.py::test_tensors_are_compared_up_to_the_first_rows_that_differ", "theseus_transport/updates/computed.py",
        "if turned else growing(self.source.shape(name)):", "if turned else [slice(0, 1)]:"),
    Bug("the largest tensors read first",
        "tests/updates/test_presumed_reads.py::test_the_first_change_is_found_with_little_reading",
        "theseus_transport/updates/changes.py", "(sizes[name], name)", "(-sizes[name], name)"),
    Bug("rows of the first part for every part", "tests/updates/test_tiles.py::test_rows_of_a_part_of_a_stored_tensor", MODELS,
        "first = slot.part * slot.shape(", "first = 0 * slot.part * slot.shape("),
    Bug("last tile dropped", "tests/updates/test_tiles.py::test_tiles_are_all_rows_in_order", MODELS,
        "for first in range(0, shape[0], step))", "for first in range(0, shape[0] - step, step))"),
    Bug("rounding of the last piece only", "tests/updates/test_tiles.py::test_rounding_adds_up_over_tiles", "theseus_transport/models/precision.py",
        "[before[0] + lost, before[1] + ", "[lost, "),
    Bug("a tile's bias change told as the whole", "tests/updates/test_tiles.py::test_a_tiled_head_warns_once", MOVES,
        "str(rows.start if rows else 0)", "str(0)"),
    Bug("a matrix of the base kept through a move", "tests/updates/test_tiles.py::test_a_move_holds_what_is_predicted", MOVES,
        "        del before\n", ""),
    Bug("a map in place of a copy", "tests/updates/test_tiles.py::test_a_move_leaves_its_inputs_alone", MODELS,
        'torch.float64, copy=True)', "torch.float64)"),

    # --- the command -------------------------------------------------------------------------------------------------
    Bug("another base accepted", "tests/jobs/test_apply.py::test_moved_and_changed_bases", "theseus_transport/jobs/provenance.py",
        "            if recorded.get(kind) != now:\n", "            if False:\n"),
    Bug("rows held out are aligned on too", "tests/calibration/test_calibration.py::test_a_batch_is_held_out_where_that_leaves_two",
        "theseus_transport/calibration/calibration.py", "batches_of(*_rows(sides, slice(rows)),", "batches_of(*sides,"),
    Bug("the end of the data held out",
        "tests/calibration/test_calibration.py::test_what_is_held_out_is_from_everywhere", "theseus_transport/calibration/calibration.py",
        "drawn[:fit].sort().values, drawn[fit:].sort().values", "drawn.sort().values"),
    Bug("a batch held out of few rows",
        "tests/calibration/test_calibration.py::test_what_is_held_out_is_a_third_at_most_and_no_more_than_a_batch[8]",
        "theseus_transport/calibration/calibration.py", "return min(most, rows // 3)", "return min(most, rows - 1)"),
    Bug("time of all that could be aligned", "tests/budget/test_time.py::test_a_job_predicts_what_it_needs_alone",
        "theseus_transport/budget/needs.py", "    if keys is None:\n", "    if True:\n"),
    Bug("one model's batches checked",
        "tests/updates/test_arguments.py::test_batches_are_refused_before_a_model_runs[of the target]",
        "theseus_transport/activations/inputs.py", "for info, side in infos.zip(pair):",
        "for info, side in infos.zip(pair)[:1]:"),
    Bug("a delta the wrong way round moved", "tests/updates/test_arguments.py::test_a_delta_the_wrong_way_round",
        "theseus_transport/updates/arguments.py", "if swapped and known != ", "if swapped and known == "),
    Bug("the prompt told twice", "tests/calibration/test_calibration_lines.py::test_formats_of_training_data[chosen turns]",
        "theseus_transport/calibration/formats.py", "replied if replied[: len(asked)] == asked else asked", "asked"),
    Bug("rounding measured against what was rounded", "tests/jobs/test_apply.py::test_rounding_is_measured_and_named",
        "theseus_transport/models/precision.py", "rounded.double() - old.double() - by.double()",
        "rounded.double() - (old + by).to(rounded).double()"),
    Bug("matched strength without the weights' sizes",
        "tests/jobs/test_apply.py::test_matched_strength_moves_the_target_as_far_as_the_source[lora]",
        "theseus_transport/updates/alpha.py", "(delta_s / weight_s * weight_t / delta_t)", "(delta_s / delta_t)"),
    Bug("shifted rows not shifted", "tests/alignment/test_quality.py::test_shifted_rows[5-4]", "theseus_transport/alignment/quality.py",
        "matched(t, own, other.roll(-step, 0))", "matched(t, own, other)"),
    Bug("copies of a head counted once", "tests/alignment/test_quality.py::test_scales_and_copies_of_heads_do_not_count",
        "theseus_transport/recipes/maps.py",
        "own, other = t.by_head(own),", "own, other = own.unflatten(0, (t.heads, -1))[[0, 1, 1]],"),
    Bug("every strength moved anew", "tests/jobs/test_apply.py::test_several_strengths_move_each_layer_once[lora]",
        "theseus_transport/updates/output.py", "compute=partial(last.of, moved.compute)", "compute=moved.compute"),
    Bug("what only a guess would lose is refused",
        "tests/jobs/test_across.py::test_a_block_that_only_a_guess_would_lose_is_moved", "theseus_transport/updates/computed.py",
        "any(reason.endswith(GUESSED) for reason in reasons)", "False"),
    Bug("maps left beside a refused output",
        "tests/cli/test_command.py::test_refused_with_one_message[NaN in tuned, matched]", "theseus_transport/jobs/in_two_steps.py",
        "(AlreadyDone, InputRefused, NumericalError)", "(AlreadyDone, NumericalError)"),
    Bug("integers aligned", "tests/jobs/test_apply.py::test_align_refuses_and_leaves_nothing", "theseus_transport/jobs/bases.py",
        "        check_dtypes(*checkpoints)\n", ""),
    Bug("every unit counts in 1024", "tests/cli/test_memory_options.py::test_sizes[8GB-8000000000]",
        "theseus_transport/cli/options.py", "1000 if match[4] and not match[3] else 1024", "1024"),
    Bug("a budget not kept to",
        "tests/cli/test_memory_options.py::test_a_budget_below_the_least_is_refused_with_the_least_that_does",
        "theseus_transport/jobs/bases.py", "budget=(job.max_ram, job.max_memory)", "budget=(None, job.max_memory)"),
    Bug("hidden states stay in memory all the same",
        "tests/cli/test_memory_options.py::test_hidden_states_in_files_change_no_byte", "theseus_transport/jobs/bases.py",
        "offload=job.offload_folder is not None", "offload=False"),
    Bug("what is done already told as an error", "tests/cli/test_memory_options.py::test_a_whole_folder_needs_no_resume",
        "theseus_transport/cli/failures.py", "    except AlreadyDone as done:", "    except ZeroDivisionError as done:"),

    # --- weights -----------------------------------------------------------------------------------------------------
    Bug("a file that changed is read on",
        "tests/files/test_reading.py::test_reading_after_the_file_changed[touched-safetensors]",
        "theseus_transport/files/checkpoint.py", "        if now != then:\n", "        if now[0] != then[0]:\n"),
    Bug("what a short read left out is handed on",
        "tests/files/test_reading.py::test_a_shard_cut_short_says_how_far_it_got", "theseus_transport/files/checkpoint.py",
        "raise OSError(errno.EIO, ", "break\n                raise OSError(errno.EIO, "),
    Bug("a read that stops half way starts again", "tests/files/test_reading.py::test_rows_read_only_themselves",
        "theseus_transport/files/checkpoint.py", "[into[done:end]], shift + done)", "[into[done:end]], first)"),
    Bug("all rows between two are read", "tests/files/test_reading.py::test_neighbouring_rows_are_read_together",
        "theseus_transport/files/checkpoint.py", "index.tensor_split((jumps != 1)", "index.tensor_split((jumps != 0)"),
    Bug("minus infinity passes as finite", "tests/files/test_reading.py::test_one_bad_value_anywhere_is_found",
        "theseus_transport/files/checkpoint.py", "if not (low.isfinite() and high.isfinite())", "if not high.isfinite()"),
    Bug("a tensor read ahead is read again", "tests/streaming/test_window.py::test_a_walk_over_blocks_reads_everything_once",
        "theseus_transport/streaming/window.py", "if (coming := self._coming.pop(name, None)) is not None:",
        "if (coming := self._coming.pop(name, None)) is None and False:"),
    Bug("rows of a tensor on its way read beside it",
        "tests/streaming/test_window.py::test_errors_surface_where_the_tensor_is_wanted", "theseus_transport/streaming/window.py",
        "        if name in self._coming:\n", "        if False:\n"),
    Bug("rows pass unchecked", "tests/streaming/test_window.py::test_every_read_is_checked[at once]",
        "theseus_transport/streaming/window.py", "self._checked(name, self.checkpoint.rows(name, rows))",
        "self.checkpoint.rows(name, rows)"),
    Bug("a tensor let go is read all the same", "tests/streaming/test_window.py::test_what_is_let_go_before_it_came_is_not_read",
        "theseus_transport/streaming/window.py", "if not read.cancel()])", "])"),

    # --- resumable folders -------------------------------------------------------------------------------------------
    Bug("a commit that is not durable", "tests/files/test_journal.py::test_commit_makes_durable_before_it_counts",
        "theseus_transport/files/journal.py", "        self._flush()\n        for path in [*files,",
        "        for path in [*files,"),
    Bug("the journal written over in place", "tests/files/test_journal.py::test_commit_makes_durable_before_it_counts",
        "theseus_transport/files/run_record.py", "os.replace(folder / NEXT, folder / JOURNAL)",
        "(folder / JOURNAL).write_bytes((folder / NEXT).read_bytes())"),
    Bug("a commit's tensors gone before the next counts", "tests/files/test_kill_journal.py::test_killed_at_every_step",
        "theseus_transport/files/journal.py", "        if tensors:\n            write_plain(",
        "        self._place.state(step - 1).unlink(missing_ok=True)\n        if tensors:\n            write_plain("),
    Bug("names before all folders are whole", "tests/files/test_journal.py::test_interrupt_at_the_end[seal-1-()]",
        "theseus_transport/files/journal.py", "            layout.complete(place,",
        "            self._save(whole=True)\n            layout.complete(place,"),
    Bug("what was written since the last commit taken for written",
        "tests/files/test_journal.py::test_interrupt_then_resume[()-make 1.w]", "theseus_transport/files/journal.py",
        "record, set(record.written), set(record.dropped)", "record, set(self._plans[0]), set(record.dropped)"),
    Bug("a dropped tensor written", "tests/files/test_journal.py::test_same_bytes_as_a_write_in_one_go[1-('1.w',)]",
        "theseus_transport/files/journal.py", "self._layout.without(self.dropped)", "self._layout"),
    Bug("changed inputs resumed", "tests/files/test_run_folder.py::test_changed_key_is_named[input]",
        "theseus_transport/files/run_folder.py", "if changed := record.changes(self.record.key):",
        "if False and (changed := record.changes(self.record.key)):"),
    Bug("other shards resumed", "tests/files/test_run_folder.py::test_changed_plan_is_refused",
        "theseus_transport/files/run_folder.py", "if record.plan != self.record.plan:", "if False:"),
    Bug("two processes at once", "tests/files/test_run_folder.py::test_second_process_is_refused",
        "theseus_transport/files/run_record.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
    Bug("links in a work folder followed",
        "tests/files/test_run_folder.py::test_damaged_or_hostile_folder_is_refused[linked shard]",
        "theseus_transport/files/run_folder.py", "whole = not any(path.is_symlink() for", "whole = not any(False for"),
    Bug("room for what is staged asked for again", "tests/files/test_run_folder.py::test_room_counts_what_is_staged",
        "theseus_transport/files/run_folder.py", "self.layout.nbytes - there))", "self.layout.nbytes))"),
    Bug("a full disk loses the run", "tests/files/test_journal.py::test_what_an_error_leaves[full]",
        "theseus_transport/files/journal.py", "isinstance(error, (OSError, ResourceError))",
        "isinstance(error, ResourceError)"),
    Bug("tiles written over each other", "tests/files/test_writer.py::test_tiles_are_made_one_by_one_for_all_folders",
        "theseus_transport/files/writer.py", "rows.start * row if rows else 0", "0"),

    # --- the ops ------------------------------------------------------------------------------------------------
    Bug("heads that do not fill the widths accepted",
        "tests/ext/test_cross_moment_contract.py::test_lists_name_the_space_that_does_not_fit", "theseus_ext/checks.py",
        "return heads > 0 and (heads * cross.shape[1], heads * cross.shape[2]) == (source, target)",
        "return heads > 0"),
    Bug("spaces of a list on another device accepted",
        "tests/ext/test_cross_moment_contract.py::test_lists_that_do_not_fit_each_other_are_refused",
        "theseus_ext/checks.py", "if x.device != source[0].device:", "if x.device != x.device:"),
    Bug("masters of a list keep their version",
        "tests/ext/test_cross_moment_contract.py::test_bumps_the_version_of_what_it_writes_and_lets_no_gradient_through",
        "theseus_ext/ops.py",
        "increment_version([tensor for tensors in masters.values() for tensor in tensors])", "increment_version([])"),
]
BUGS += [
    Bug(*bug)
    for bug in (*CALIBRATION_BUGS, *STREAM_BUGS, *CHOICE_BUGS, *RECORD_BUGS, *NUMBER_BUGS, *FIT_BUGS, *EFFECT_BUGS, *HOSTILE_BUGS)
]
