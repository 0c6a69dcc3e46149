"""Bugs to plant, one at a time, each with the test that must turn red. A bug that no test sees is a missing test."""

from dataclasses import dataclass


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


CAPTURE, COHERENT, DELTA, DEPTH, FAMILIES, FAMILY, LINKS, MAPS, MODELS = (
    f"theseus_transport/{name}.py"
    for name in ("capture", "coherent", "delta", "depth", "families", "family", "links", "maps", "models")
)
MOMENTS, MOVES, OPENED, OUTPUT, OWN, PAIRING, PAPER, PIECES, PROCRUSTES = (
    f"theseus_transport/{name}.py"
    for name in ("moments", "moves", "opened", "output", "integrations/own", "pairing", "paper", "pieces", "procrustes")
)
RECIPES, REGRESSION, TOKENS, TRANSPORT, UPDATE, VECTORS, VISION, WHITENING = (
    f"theseus_transport/{name}.py"
    for name in ("recipes", "regression", "tokens", "transport", "update", "vectors", "vision_families", "whitening")
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
        '"bias": d_bias / scale - moved @ shift}', '"bias": d_bias / scale}'),
    Bug("bias change of a reader without bias dropped", vit("identity-no-qkv-bias"), MOVES,
        "    if bool(rest.any()):\n", "    if False:\n"),
    Bug("z read without the norm's bias", vit("identity-new-gains"), MOMENTS,
        "        n = float(self.count)\n        (gain_s",
        "        n = float(self.count)\n        source, target = ((g, 0 * b) for g, b in (source, target))\n"
        "        (gain_s"),
    Bug("tied head folded", llama("tied", "everything"), MODELS,
        "slots.pop(f\"{layout.family.heads.get('vocabulary')}.weight\", None)",
        'slots["lm_head.weight"] = slots["embed_tokens.weight"]'),
    Bug("final norm's own change dropped", llama("tied", "gains"), MOVES,
        "    return target * torch.where(share > 0, mixed", "    return 0 * target * torch.where(share > 0, mixed"),

    # --- maps --------------------------------------------------------------------------------------------------------
    Bug("T_in and T_out swapped where both are square", vit("rotated"), MOVES,
        "self.write(self.read(w1 - w0).T).T",
        '(self.read(self.write(w1 - w0).T).T if self.into.role == "output" else self.write(self.read(w1 - w0).T).T)'),
    Bug("map transposed", llama("rotated"), MAPS,
        "return rows @ self.matrix.to(rows)", "return rows @ self.matrix.to(rows).T"),
    Bug("expanding layers mapped by their own output", llama("up-times-3"), COHERENT,
        'rule = Rule(own.name, f"{b}.mlp", f"{b}.middle", whitened, scale)',
        'seen = e.moments[f"{b}.mlp"].derive(e.source.augmented(own.name), e.target.augmented(layer.name))\n'
        "                    out.add(layer.name, procrustes(seen.cross), seen.count)\n"
        '                    rule = Rule(own.name, f"{b}.mlp", layer.name, whitened, scale)'),
    Bug("rank of neurons read off their covariance", llama("massive-neuron"), COHERENT,
        "floor=recipe.floor, energies=energies)", "floor=1e-6)"),
    Bug("residual writers mapped by their own output", vit("rotated"), COHERENT,
        'rule = Rule(own.name, f"{b}.context", f"{b}.mlp", 1.0, written(layer.name))',
        'seen = e.moments[f"{b}.context"].derive(e.source.augmented(own.name), e.target.augmented(layer.name))\n'
        "                    out.add(layer.name, procrustes(seen.cross), seen.count)\n"
        '                    rule = Rule(own.name, f"{b}.context", layer.name, 1.0, written(layer.name))'),
    Bug("dense maps for queries and keys", llama("turned-in-heads"), COHERENT,
        'rule = Rule(own.name, reads, f"{b}.{layer.role}", whitened)',
        'seen = e.moments[f"{b}.attention"].derive(e.source.augmented(own.name), e.target.augmented(layer.name))\n'
        "                    out.add(layer.name, procrustes(seen.cross), seen.count)\n"
        '                    own_map = f"{b}.value" if layer.role == "value" else layer.name\n'
        "                    rule = Rule(own.name, reads, own_map, whitened)"),
    Bug("queries and keys mapped like values", llama("turned-in-heads"), COHERENT,
        "    t_shared = procrustes(shared,", "    t_shared = procrustes(paired,"),
    Bug("a block's last layer writes the block's own space", llama("rank-poor-vocabulary"), COHERENT,
        "after = after_name(source, target, e.blocks, b)", 'after = f"{b}.attention"'),
    Bug("heads paired by index", llama("permuted"), PAIRING,
        "    score = similarity(context, heads)\n", "    score = torch.eye(*heads, dtype=torch.float64)\n"),
    Bug("groups of heads paired by index", llama("permuted"), PAIRING,
        "    kv, _ = _assign(quality)\n", "    kv = torch.arange(kv_heads[1]) % kv_heads[0]\n"),
    Bug("completion left out", llama("rank-poor-vocabulary", "everything"), COHERENT,
        'if recipe.completion == "deeper" and min(', "if False and min("),
    Bug("embeddings moved without a map", llama("rotated", "everything"), COHERENT,
        'Rule(name, "identity", output, 1.0, written(', 'Rule(name, "identity", "identity", 1.0, written('),
    Bug("mean of a tied table dropped", family("gpt2-tied", "everything"), COHERENT,
        "if token and target.tied and layer_norm:", "if False:"),
    Bug("blocks paired off by one", llama("two-blocks-more"), DEPTH,
        "found[j] = i\n", "found[j] = max(i - 1, 0)\n"),
    Bug("blocks paired greedily", "tests/test_depth.py::test_the_pairing_is_the_best_of_all", DEPTH,
        "        if best[i, j] == best[i, j - 1]:\n", "        if j > i and best[i, j] == best[i, j - 1]:\n"),
    Bug("sizes of what blocks add counted", "tests/test_depth.py::test_likeness_ignores_turns_and_sizes", DEPTH,
        "nuclear / size.clamp(min=torch.finfo(size.dtype).tiny)", "nuclear"),
    Bug("spaces of another source block compared", llama("two-blocks-more"), LINKS,
        "Link(source.space(own, part), target", "Link(source.space(min(b, source.depth - 1), part), target"),
    Bug("space behind a block taken from the block before", llama("shallower"), LINKS,
        "Link(source.after(own), target.after(b))", "Link(source.after(max(own - 1, 0)), target.after(b))"),
    Bug("what follows a block taken for a neighbour's", "tests/test_depth.py::test_what_follows_a_block_is_compared"
        "_with_what_follows_its_source", LINKS, "and blocks[b + 1] == own + 1 else", "else"),
    Bug("register tokens of one side counted", family("dino-registers-added", "linear"), CAPTURE,
        "tokens.select(kept[1].repeat(samples))", "tokens.select(kept[1].repeat(samples).roll(1))"),

    # --- families ----------------------------------------------------------------------------------------------------
    Bug("factor behind a writer not folded", family("dino-new-scales", "linear"), MOVES,
        "return scale[:, None] * w * gain,", "return w * gain,"),
    Bug("factor behind a writer not unfolded", family("dino-new-scales", "linear"), MOVES,
        "moved = d_weight / gain / scale[:, None]\n", "moved = d_weight / gain\n"),
    Bug("change of a factor behind a writer dropped", family("dino-new-scales", "gains"), MOVES,
        "            scale = part(factor, scale)\n", "            pass\n"),
    Bug("gain of a norm inside heads dropped", family("qwen3-flipped-in-heads", "gains"), RECIPES,
        "if own is not None and all(names):", "if False:"),
    Bug("Conv1D read as [out, in]", family("gpt2-new-gains", "linear"), FAMILIES,
        r'transposed=(r"\.c_attn$", r"\.c_proj$",', r'transposed=(r"\.c_attn$",'),
    Bug("chunks of a fused layer in another order", family("gpt2-turned-in-heads", "gains"), FAMILIES,
        '("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v")', '("attn.c_attn.q", "attn.c_attn.v", "attn.c_attn.k")'),
    Bug("norm in front of the first block left", family("clip-new-gains", "gains"), RECIPES,
        "        if source.family.embedding_norm and target.family.embedding_norm:\n"
        "            yield source.family.embedding_norm, target.family.embedding_norm, \"embedding\"\n"
        "        for b, own", "        for b, own"),
    Bug("parts of a fused layer in reverse", "tests/test_moves.py::test_a_part_of_a_stored_tensor", FAMILY,
        "rows.chunk(self.parts)[self.part]", "rows.chunk(self.parts)[-1 - self.part]"),
    Bug("part of a fused output taken from another", family("gpt2-turned-in-heads", "gains"), CAPTURE,
        "output.chunk(slot.parts, -1)[slot.part]", "output.chunk(slot.parts, -1)[-1 - slot.part]"),
    Bug("key and value of in_proj exchanged", family("open-clip-turned-in-heads", "gains"), VISION,
        '"attn.in_proj.k", "attn.in_proj.v")}', '"attn.in_proj.v", "attn.in_proj.k")}'),
    Bug("transposed weight not turned", "tests/test_moves.py::test_a_part_of_a_stored_tensor", FAMILY,
        "rows = stored.mT if self.transposed and stored.ndim == 2 else stored", "rows = stored"),
    Bug("transposed weight not turned back", family("gpt2-new-gains", "linear"), UPDATE,
        "if turned and fused.ndim == 2 else", "if turned and fused.ndim == 2 and len(fused) != fused.shape[1] else"),
    Bug("parts of a fused update in another order", family("gpt2-turned-in-heads", "gains"), UPDATE,
        "parts[i] for i in range(len(parts))", "parts[i] for i in reversed(range(len(parts)))"),
    Bug("positions taken by index", "tests/test_moves.py::test_positions_follow_the_grid", VECTORS,
        'if target.family.modality == "vision":', "if False:"),
    Bug("class token's position interpolated too", "tests/test_moves.py::test_positions_follow_the_grid", VECTORS,
        "mixed[into:, own:] = grid(", "mixed[into - 1 : -1, own:] = grid("),
    Bug("mask of MultiheadAttention ignored", "tests/test_opened.py::test_same_output", OPENED,
        "q, k, v, attn_mask=attn_mask,", "q, k, v, attn_mask=None,"),
    Bug("bool mask of MultiheadAttention read the other way", "tests/test_opened.py::test_same_output", OPENED,
        "            attn_mask = ~attn_mask ", "            pass "),
    Bug("tokens and batch of MultiheadAttention exchanged", "tests/test_opened.py::test_same_output", OPENED,
        "rows = query if self.batch_first else query.transpose(0, 1)", "rows = query"),
    Bug("heads of MultiheadAttention masked in another order", "tests/test_opened.py::test_same_output", OPENED,
        "attn_mask.unflatten(0, (-1, self.heads))", "attn_mask.unflatten(0, (self.heads, -1)).transpose(0, 1)"),
    Bug("attention over other tokens taken for self-attention",
        "tests/test_opened.py::test_anything_else_is_the_originals", OPENED,
        "query is not key or key is not value or", "query is not key or"),

    # --- scales ------------------------------------------------------------------------------------------------------
    Bug("no scale from energies", llama("up-times-3"), COHERENT,
        "    return math.sqrt(target / source) if", "    return 1.0 if"),
    Bug("scale of z dropped", llama("widened"), COHERENT,
        "    whitened = math.sqrt(target.width / source.width) if", "    whitened = 1.0 if"),
    Bug("s_out dropped", llama("widened-rescaled"), MOVES,
        "d_weight = self.rule.scale_out / self.rule.scale_in", "d_weight = 1 / self.rule.scale_in"),
    Bug("s_in dropped", llama("widened"), MOVES,
        "d_weight = self.rule.scale_out / self.rule.scale_in", "d_weight = self.rule.scale_out"),
    Bug("bias unscaled", vit("rotated", "gains"), MOVES,
        "d_bias = self.rule.scale_out * self.write(b1 - b0)", "d_bias = self.write(b1 - b0)"),
    Bug("residual writers scaled with the mean over features", vit("rotated"), COHERENT,
        "own = energy.centred if layer_norm else", "own = energy.centred if False else"),
    Bug("expanding layers scaled by h", llama("up-times-3"), COHERENT,
        "_scale(float(seen.source[alive[0]].sum()), float(seen.target[alive[1]].sum()), recipe)",
        "_scale(float(middle.source_energy.sum()), float(middle.target_energy.sum()), recipe)"),
    Bug("silent neurons counted", llama("silent-gate"), COHERENT,
        "alive = [x > recipe.floor**2 * x.max() for x", "alive = [x > -1 for x"),
    Bug("copies of a head read in full", llama("one-query-copied"), COHERENT,
        "read.blocks / copies[:, None, None]", "read.blocks"),
    Bug("regression at the input only", "tests/test_moves.py::test_regression_scales_by_what_a_map_predicts",
        REGRESSION, "scale_out=rule.scale_out * outer", "scale_out=rule.scale_out"),
    Bug("regression at the output only", "tests/test_moves.py::test_regression_scales_by_what_a_map_predicts",
        REGRESSION, "scale_in=rule.scale_in / inner", "scale_in=rule.scale_in"),
    Bug("regression of a writer with the mean over features",
        "tests/test_moves.py::test_regression_scales_by_what_a_map_predicts", REGRESSION,
        "energies = (totals[0], totals[1]) if writes else", "energies = (totals[0], totals[1]) if False else"),
    Bug("context read without its scale", llama("scaled-heads"), COHERENT,
        "blocks(t_context, 1 / _ratios(e_context, recipe),", "blocks(t_context, 1 + 0 * _ratios(e_context, recipe),"),
    Bug("values scaled like keys", llama("scaled-heads"), COHERENT,
        "blocks(t_context, _ratios(e_value, recipe),", "blocks(t_context, _ratios(e_key, recipe),"),

    # --- adapters ----------------------------------------------------------------------------------------------------
    Bug("bias of the norm lost behind factors", adapter("vit-identity-new-gains"), MOVES,
        "if self.rule.fold and bool(rest.any()):\n", "if False:\n"),
    Bug("gain of the source not folded into A", adapter("llama-identity-new-gains"), MOVES,
        "self.read(a * gain_s)", "self.read(a)"),
    Bug("rslora ignored", "tests/test_delta.py::test_products_are_pefts[rslora]", DELTA,
        'if self.config.get("use_rslora") else', "if False else"),
    Bug("rank pattern ignored", "tests/test_delta.py::test_products_are_pefts[rank-pattern]", DELTA,
        '_by_pattern(self.config.get("rank_pattern"), layer, self.config["r"])', 'self.config["r"]'),
    Bug("patterns match anywhere in a name", "tests/test_delta.py::test_products_are_pefts[near-misses]", DELTA,
        're.match(rf"(.*\\.)?({pattern})$", layer)', "re.search(pattern, layer)"),
    Bug("product of the factors unscaled", "tests/test_transport.py::test_factors_and_their_product_move_alike",
        TRANSPORT, "f.scaling * (f.b.double() @ f.a.double())", "f.b.double() @ f.a.double()"),
    Bug("alpha in both factors", "tests/test_update.py::test_peft_loads_the_moved_adapter[plain]", OUTPUT,
        '1.0 if part == "a" else update.alpha', "update.alpha"),
    Bug("factors of fused parts in another order", "tests/test_moves.py::test_factors_of_a_fused_layer", PIECES,
        "piece.place.part * rows", "(parts - 1 - piece.place.part) * rows"),
    Bug("factors of fused layers one over the other", "tests/test_moves.py::test_factors_of_a_fused_layer", PIECES,
        "            start = span.stop\n", "            pass\n"),
    Bug("scale of the first fused layer for all", "tests/test_moves.py::test_factors_of_a_fused_layer", PIECES,
        "moved.b * (piece.scaling / first.scaling)", "moved.b"),
    Bug("first part of a fused B moved for all",
        "tests/exact/test_families.py::test_adapter_is_exact[gpt2-rotated-lora]", TRANSPORT,
        "factors.b.chunk(slot.parts)[slot.part]", "factors.b.chunk(slot.parts)[0]"),

    # --- paper ------------------------------------------------------------------------------------------------------
    Bug("whitened on one side only", "tests/test_whitening.py::test_whole_whitening_leaves_correlations", WHITENING,
        "return left @ cross.double() @ right", "return left @ cross.double()"),
    Bug("Grams left uncentred", "tests/test_whitening.py::test_centring_is_of_the_rows_and_comes_first", PAPER,
        "moment.centred(), grams and (grams[0].centred(), grams[1].centred())", "moment.centred(), grams"),
    Bug("parts of in_proj in reverse", "tests/test_drop_in.py::test_fused_attention_equals_split_and_is_put_back", OWN,
        'Tap(module, "out", i, parts)', 'Tap(module, "out", parts - 1 - i, parts)'),
    Bug("proj read as [out, in]", "tests/test_drop_in.py::test_towers_against_hooks_and_svds[cls-False-wider]", OWN,
        '(Tap("", "out"),), transposed=True)', '(Tap("", "out"),), transposed=False)'),

    # --- moments and mixings -----------------------------------------------------------------------------------------
    Bug("mask ignored", "tests/test_capture.py::test_masked_tokens_have_no_influence", CAPTURE,
        "chosen = tokens.select(masks[1].cpu())", "chosen = tokens.select(torch.ones_like(masks[1].cpu()))"),
    Bug("hooks left behind after an error", "tests/test_capture.py::test_models_are_as_they_were", CAPTURE,
        "stack.callback(handle.remove)", "stack.callback(lambda h=handle: session._seen and h.remove())"),
    Bug("evaluation mode left behind", "tests/test_capture.py::test_models_are_as_they_were", CAPTURE,
        "            module.training = mode\n", "            pass\n"),
    Bug("samples of two tokenizers mixed", "tests/test_capture.py::test_text_of_two_tokenizers_is_mixed_by_characters",
        CAPTURE, "columns.append(mixing.column + i * width)", "columns.append(mixing.column)"),
    Bug("energies of masked tokens counted", "tests/test_capture.py::test_masked_tokens_have_no_influence", MOMENTS,
        "moment.update(rows, total, mixing, mixing)", "moment.update(rows, total)"),
    Bug("samples of a batch mixed", "tests/test_tokens.py::test_batched_mixes_every_sample_alone", TOKENS,
        "column = (self.column + self.tokens * start[:, None])", "column = (self.column + self.rows * start[:, None])"),
    Bug("tokens counted instead of rows", "tests/test_moments.py::test_mixing_on_either_side", MOMENTS,
        "len(target) if target_mixing is None else target_mixing.rows", "len(source)"),
    Bug("outputs' moment without biases", "tests/test_moments.py::test_derive_is_the_moment_of_the_outputs", MOMENTS,
        "    last[0, -1] = 1\n", ""),

    # --- polar factor ------------------------------------------------------------------------------------------------
    Bug("noise counted as rank", "tests/test_procrustes.py::test_default_floor_is_not_moved_by_rounding", PROCRUSTES,
        "FLOOR = 1e-6", "FLOOR = 1e-12"),
    Bug("certificate accepts T = 0", "tests/test_procrustes.py::test_certificate_rejects_zero_whatever_rank_it_claims",
        PROCRUSTES,
        "left_out = 2 * floor * scale", "left_out = scale + 2 * floor * scale"),
    Bug("certificate accepts reflections", "tests/test_procrustes.py::test_certificate_rejects", PROCRUSTES,
        "torch.linalg.cholesky_ex(shifted)[1] != 0, 0.5)", "torch.linalg.cholesky_ex(shifted)[1] != 0, 2)"),

    # --- fates -------------------------------------------------------------------------------------------------------
    Bug("a changed tensor without a rule dropped", "tests/test_update.py::test_tuned_models_that_do_not_fit", TRANSPORT,
        """raise InputRefused(f"{name} changed but has no rule; {_leaving(name)}")""",
        'self._row(name, "unchanged")'),
    Bug("alpha ignored", "tests/test_transport.py::test_transport_is_linear", UPDATE,
        "self._stored(name) * self.alpha", "self._stored(name)"),
    Bug("head of other classes moved", "tests/test_transport.py::test_every_tensor_has_one_fate", TRANSPORT,
        'if move.own.role == "head" and rows[0] != rows[1]:', "if False:"),
    Bug("zero gain of the target divided by", "tests/test_update.py::test_a_zero_gain_of_the_target_is_named", MOVES,
        "if bool((values == 0).any()):", "if False:"),
    Bug("change of a norm not folded into its readers", llama("rotated", "gains"), TRANSPORT,
        "& self.changed if rule.fold else set()", "& set() if rule.fold else set()"),

    # --- the command -------------------------------------------------------------------------------------------------
    Bug("another base accepted", "tests/test_apply.py::test_moved_and_changed_bases", "theseus_transport/bases.py",
        "                if recorded.get(kind) != now:\n", "                if False:\n"),
    Bug("rows held out are aligned on too", "tests/test_calibration.py::test_a_batch_is_held_out_where_that_leaves_two",
        "theseus_transport/calibration.py", "batches_of(*_rows(sides, slice(rows)),", "batches_of(*sides,"),
    Bug("rounding measured against what was rounded", "tests/test_apply.py::test_rounding_is_measured_and_named",
        "theseus_transport/output.py", "rounded.double() - base.double() - change.double()",
        "rounded.double() - (base + change).to(rounded).double()"),
    Bug("matched strength without the weights' sizes",
        "tests/test_apply.py::test_matched_strength_moves_the_target_as_far_as_the_source[lora]",
        "theseus_transport/strength.py", "(delta_s / weight_s * weight_t / delta_t)", "(delta_s / delta_t)"),
    Bug("shifted rows not shifted", "tests/test_quality.py::test_shifted_rows[5-4]", "theseus_transport/quality.py",
        "self.shifted.update(own, other.roll(-step, 0))", "self.shifted.update(own, other)"),
    Bug("copies of a head counted once", "tests/test_quality.py::test_scales_and_copies_of_heads_do_not_count",
        "theseus_transport/regression.py",
        "        own = own.unflatten(0, (t.heads, -1))[t.source_head.to(own.device)]\n", ""),
    Bug("every strength moved anew", "tests/test_apply.py::test_several_strengths_move_each_layer_once[lora]",
        "theseus_transport/output.py", "compute=partial(last, moved.compute)", "compute=moved.compute"),
]
