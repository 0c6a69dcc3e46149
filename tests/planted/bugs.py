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


def adapter(pair: str) -> str:
    return f"tests/exact/test_adapter.py::test_adapter_is_exact[{pair}-lora]"


CAPTURE, COHERENT, DELTA, MAPS, MODELS = (
    f"theseus_transport/{name}.py" for name in ("capture", "coherent", "delta", "maps", "models")
)
MOMENTS, MOVES, PAIRING, PROCRUSTES, RECIPES, TOKENS, TRANSPORT, UPDATE = (
    f"theseus_transport/{name}.py"
    for name in ("moments", "moves", "pairing", "procrustes", "recipes", "tokens", "transport", "update")
)

# fmt: off
BUGS = [
    # --- norms -------------------------------------------------------------------------------------------------------
    Bug("gains of norms not folded", llama("identity-new-gains"), RECIPES,
        "    fold: bool = True\n", "    fold: bool = False\n"),
    Bug("gain not unfolded at the target", llama("identity-new-gains"), MOVES,
        "    gain, shift = target.norm(norm, width)\n",
        "    gain, shift = torch.ones(width, dtype=torch.float64), target.norm(norm, width)[1]\n"),
    Bug("bias of the norm not folded", vit("identity-new-gains"), MOVES,
        "return w * gain, b + w @ shift", "return w * gain, b"),
    Bug("bias of the target's norm not unfolded", vit("identity-new-gains"), MOVES,
        '"bias": d_bias - moved @ shift}', '"bias": d_bias}'),
    Bug("bias change of a reader without bias dropped", vit("identity-no-qkv-bias"), MOVES,
        "    if bool(rest.any()):\n", "    if False:\n"),
    Bug("z read without the norm's bias", vit("identity-new-gains"), MOMENTS,
        "        n = float(self.count)\n        (gain_s",
        "        n = float(self.count)\n        source, target = ((g, 0 * b) for g, b in (source, target))\n"
        "        (gain_s"),
    Bug("tied head folded", llama("tied", "everything"), MODELS,
        'names.pop("lm_head.weight", None)', 'names["lm_head.weight"] = names["embed_tokens.weight"]'),
    Bug("final norm's own change dropped", llama("tied", "gains"), MOVES,
        "    return target * torch.where(share > 0, mixed", "    return 0 * target * torch.where(share > 0, mixed"),

    # --- maps --------------------------------------------------------------------------------------------------------
    Bug("T_in and T_out swapped where both are square", vit("rotated"), MOVES,
        "rule.scale_out / rule.scale_in\n    width",
        "rule.scale_out / rule.scale_in\n    if layer.role == 'output':\n        t_in, t_out = t_out, t_in\n    width"),
    Bug("map transposed", llama("rotated"), MAPS,
        "return rows @ self.matrix.to(rows)", "return rows @ self.matrix.to(rows).T"),
    Bug("expanding layers mapped by their own output", llama("up-times-3"), COHERENT,
        'rule = Rule(reads["expand"], f"{b}.middle", whitened, scale)',
        'seen = e.moments[f"{b}.mlp"].derive(*(x.augmented(layer.name) for x in (e.source, e.target)))\n'
        "                    out.add(layer.name, procrustes(seen.cross), seen.count)\n"
        '                    rule = Rule(reads["expand"], layer.name, whitened, scale)'),
    Bug("rank of neurons read off their covariance", llama("massive-neuron"), COHERENT,
        "floor=recipe.floor, energies=energies)", "floor=1e-6)"),
    Bug("residual writers mapped by their own output", vit("rotated"), COHERENT,
        'rule = Rule(f"{b}.context", f"{b}.mlp", 1.0, total(layer.name, own))',
        'seen = e.moments[f"{b}.context"].derive(*(x.augmented(layer.name) for x in (e.source, e.target)))\n'
        "                    out.add(layer.name, procrustes(seen.cross), seen.count)\n"
        '                    rule = Rule(f"{b}.context", layer.name, 1.0, total(layer.name, own))'),
    Bug("dense maps for queries and keys", llama("turned-in-heads"), COHERENT,
        'rule = Rule(reads["query"], f"{b}.{layer.role}", whitened)',
        'seen = e.moments[f"{b}.attention"].derive(*(x.augmented(layer.name) for x in (e.source, e.target)))\n'
        "                    out.add(layer.name, procrustes(seen.cross), seen.count)\n"
        '                    own_map = f"{b}.value" if layer.role == "value" else layer.name\n'
        '                    rule = Rule(reads["query"], own_map, whitened)'),
    Bug("queries and keys mapped like values", llama("turned-in-heads"), COHERENT,
        "    t_shared = procrustes(shared,", "    t_shared = procrustes(paired,"),
    Bug("a block's last layer writes the block's own space", llama("rank-poor-vocabulary"), COHERENT,
        'after = f"{b + 1}.attention" if b + 1', 'after = f"{b}.attention" if b + 1'),
    Bug("heads paired by index", llama("permuted"), PAIRING,
        "    score = similarity(context, heads)\n", "    score = torch.eye(*heads, dtype=torch.float64)\n"),
    Bug("groups of heads paired by index", llama("permuted"), PAIRING,
        "    kv, _ = _assign(quality)\n", "    kv = torch.arange(kv_heads[1]) % kv_heads[0]\n"),
    Bug("completion left out", llama("rank-poor-vocabulary", "everything"), COHERENT,
        "    if out.reports[0].rank < _full_rank(e):", "    if False:"),
    Bug("embeddings moved without a map", llama("rotated", "everything"), COHERENT,
        'Rule("identity", first, 1.0, total(', 'Rule("identity", "identity", 1.0, total('),

    # --- scales ------------------------------------------------------------------------------------------------------
    Bug("no scale from energies", llama("up-times-3"), COHERENT,
        "    return math.sqrt(target / source) if", "    return 1.0 if"),
    Bug("scale of z dropped", llama("widened"), COHERENT,
        "    whitened = math.sqrt(target.width / source.width) if", "    whitened = 1.0 if"),
    Bug("s_out dropped", llama("widened-rescaled"), MOVES,
        "maps[rule.output], rule.scale_out / rule.scale_in\n", "maps[rule.output], 1 / rule.scale_in\n"),
    Bug("s_in dropped", llama("widened"), MOVES,
        "maps[rule.output], rule.scale_out / rule.scale_in\n", "maps[rule.output], rule.scale_out\n"),
    Bug("bias unscaled", vit("rotated", "gains"), MOVES,
        "d_bias = rule.scale_out * t_out(b1 - b0)", "d_bias = t_out(b1 - b0)"),
    Bug("residual writers scaled with the mean over features", vit("rotated"), COHERENT,
        'own = energy.centred if family.norm == "layer" else', "own = energy.centred if False else"),
    Bug("expanding layers scaled by h", llama("up-times-3"), COHERENT,
        "_scale(float(own.source[alive[0]].sum()), float(own.target[alive[1]].sum()), recipe)",
        "_scale(float(middle.source_energy.sum()), float(middle.target_energy.sum()), recipe)"),
    Bug("silent neurons counted", llama("silent-gate"), COHERENT,
        "alive = [x > recipe.floor**2 * x.max() for x", "alive = [x > -1 for x"),
    Bug("copies of a head read in full", llama("one-query-copied"), COHERENT,
        "read.blocks / copies[:, None, None]", "read.blocks"),
    Bug("context read without its scale", llama("scaled-heads"), COHERENT,
        "blocks(t_context, 1 / _ratios(e_context, recipe),", "blocks(t_context, 1 + 0 * _ratios(e_context, recipe),"),
    Bug("values scaled like keys", llama("scaled-heads"), COHERENT,
        "blocks(t_context, _ratios(e_value, recipe),", "blocks(t_context, _ratios(e_key, recipe),"),

    # --- adapters ----------------------------------------------------------------------------------------------------
    Bug("bias of the norm lost behind factors", adapter("vit-identity-new-gains"), MOVES,
        "    if rule.fold and bool(rest.any()):\n", "    if False:\n"),
    Bug("gain of the source not folded into A", adapter("llama-identity-new-gains"), MOVES,
        "maps[rule.input](a * gain_s)", "maps[rule.input](a)"),
    Bug("rslora ignored", "tests/test_delta.py::test_products_are_pefts[rslora]", DELTA,
        'if self.config.get("use_rslora") else', "if False else"),
    Bug("rank pattern ignored", "tests/test_delta.py::test_products_are_pefts[rank-pattern]", DELTA,
        '_by_pattern(self.config.get("rank_pattern"), layer, self.config["r"])', 'self.config["r"]'),
    Bug("patterns match anywhere in a name", "tests/test_delta.py::test_products_are_pefts[near-misses]", DELTA,
        're.match(rf"(.*\\.)?({pattern})$", layer)', "re.search(pattern, layer)"),
    Bug("product of the factors unscaled", "tests/test_transport.py::test_factors_and_their_product_move_alike",
        TRANSPORT, "f.scaling * (f.b.double() @ f.a.double())", "f.b.double() @ f.a.double()"),
    Bug("alpha in both factors", "tests/test_update.py::test_peft_loads_the_moved_adapter[plain]", UPDATE,
        "Factors(moved.a, moved.b * alpha,", "Factors(moved.a * alpha, moved.b * alpha,"),

    # --- moments and mixings -----------------------------------------------------------------------------------------
    Bug("mask ignored", "tests/test_capture.py::test_masked_tokens_have_no_influence", CAPTURE,
        "chosen = tokens.select(masks[1].cpu())", "chosen = tokens.select(torch.ones_like(masks[1].cpu()))"),
    Bug("hooks left behind after an error", "tests/test_capture.py::test_models_are_as_they_were", CAPTURE,
        "        for handle in handles:\n", "        for handle in session._done and handles:\n"),
    Bug("evaluation mode left behind", "tests/test_capture.py::test_models_are_as_they_were", CAPTURE,
        "            module.training = mode\n", "            pass\n"),
    Bug("samples of two tokenizers mixed", "tests/test_capture.py::test_text_of_two_tokenizers_is_mixed_by_characters",
        CAPTURE, "columns.append(mixing.column + i * width)", "columns.append(mixing.column)"),
    Bug("energies of masked tokens counted", "tests/test_capture.py::test_masked_tokens_have_no_influence", MOMENTS,
        "in (rows if mixing is None else mixing(rows)).split", "in rows.split"),
    Bug("samples of a batch mixed", "tests/test_tokens.py::test_batched_mixes_every_sample_alone", TOKENS,
        "column = (self.column + self.tokens * start[:, None])", "column = (self.column + self.rows * start[:, None])"),
    Bug("tokens counted instead of rows", "tests/test_moments.py::test_mixing_on_either_side", MOMENTS,
        "len(target) if target_mixing is None else target_mixing.rows", "len(source)"),
    Bug("outputs' moment without biases", "tests/test_moments.py::test_derive_is_the_moment_of_the_outputs", MOMENTS,
        "    last[0, -1] = 1\n", ""),

    # --- polar factor ------------------------------------------------------------------------------------------------
    Bug("noise counted as rank", "tests/test_procrustes.py::test_default_floor_is_not_moved_by_rounding", PROCRUSTES,
        "FLOOR = 1e-6", "FLOOR = 1e-12"),
    Bug("certificate accepts T = 0", "tests/test_procrustes.py::test_certificate_rejects", PROCRUSTES,
        "left_out = 2 * floor * scale", "left_out = scale + 2 * floor * scale"),
    Bug("certificate accepts reflections", "tests/test_procrustes.py::test_certificate_rejects", PROCRUSTES,
        "torch.linalg.cholesky_ex(shifted)[1] != 0, 0.5)", "torch.linalg.cholesky_ex(shifted)[1] != 0, 2)"),

    # --- fates -------------------------------------------------------------------------------------------------------
    Bug("a changed tensor without a rule dropped", "tests/test_update.py::test_tuned_models_that_do_not_fit", TRANSPORT,
        """raise InputRefused(f"{name} changed but has no rule; {_leaving(name)}")""",
        'self._row(name, "unchanged")'),
    Bug("alpha ignored", "tests/test_transport.py::test_transport_is_linear", UPDATE,
        "self._last[1][name] * self.alpha", "self._last[1][name]"),
    Bug("head of other classes moved", "tests/test_transport.py::test_every_tensor_has_one_fate", TRANSPORT,
        'if layer.role == "head" and rows[0] != rows[1]:', "if False:"),
    Bug("zero gain of the target divided by", "tests/test_update.py::test_a_zero_gain_of_the_target_is_named", MOVES,
        "    if bool((gain == 0).any()):", "    if False:"),
    Bug("change of a norm not folded into its readers", llama("rotated", "gains"), TRANSPORT,
        "& self.changed if rule.fold else set()", "& set() if rule.fold else set()"),
]
