"""Bugs to plant in the recipe `effect` as it streams, as in `bugs`: (name, test, file, old, new)."""

STREAMS, WRITER, PREDICTIONS, LOOP, ALPHA, EFFECT, FITS, MERGED, WEIGHTS, VERDICT, LAST, PASSAGE = (
    f"theseus_transport/{name}.py"
    for name in (
        "streaming/streams",
        "streaming/writer_fit",
        "streaming/predictions",
        "streaming/loop",
        "updates/alpha",
        "recipes/effect",
        "updates/fits",
        "updates/merged",
        "streaming/changed_weights",
        "streaming/verdict",
        "streaming/last_point",
        "streaming/passage",
    )
)


def by_hand(family: str) -> str:
    return f"tests/streaming/test_streams.py::test_fits_are_those_said_by_hand[{family}]"


CHANGED, LAST_POINT, JUDGED = (
    f"tests/streaming/test_{name}.py::test_" for name in ("changed_weights", "last_point", "verdict")
)
WHOLE = "tests/streaming/test_stream_jobs.py::test_a_job_writes_what_whole_models_give[effect]"

RIDGE = "tests/streaming/test_held_out_ridge.py::"
DEPTHS = "tests/jobs/test_depths.py::"

# fmt: off
EFFECT_BUGS = [
    ("samples that judge counted batch by batch",
     f"{RIDGE}test_the_penalty_is_the_one_with_the_least_error_on_every_fourth_sample", STREAMS,
     "                count += len(after)\n", ""),
    ("those that judge left out of the fit",
     f"{RIDGE}test_the_penalty_is_the_one_with_the_least_error_on_every_fourth_sample", WRITER,
     "normal = reduce(add, normals)", "normal = normals[0]"),
    ("fitted though it helps on no other sample",
     f"{RIDGE}test_where_an_effect_cannot_be_foretold_nothing_is_fitted", WRITER,
     "chosen_ridge(*normals, bias=bias) if", "(chosen_ridge(*normals, bias=bias) or RecipeChoices.ridge) if"),
    ("rows of all samples taken for those of a few", "tests/activations/test_effects.py::"
     "test_rows_of_samples_are_those_of_these_samples[grids]", "theseus_transport/activations/pairing_tokens.py",
     "tokens.select(kept) if mixing is None else mixing.only(kept)",
     "tokens.select(kept) if mixing is None else mixing"),
    ("weights of other rows kept",
     "tests/activations/test_row_mixing.py::test_only_keeps_the_rows_that_are_asked_for[[1, 2]-sparse]",
     "theseus_transport/activations/row_mixing.py",
     "None if self.weight is None else self.weight[entries]", "None if self.weight is None else self.weight[: int(entries.sum())]"),
    ("the pairing not part of what a run goes on with",
     f"{DEPTHS}test_a_pairing_is_read_by_the_command_and_part_of_what_a_run_goes_on_with",
     "theseus_transport/jobs/bases.py", '"depth": depth, "versions"', '"versions"'),
    ("a pairing that is told planned as compared", f"{DEPTHS}test_blocks_that_are_told_are_not_compared",
     "theseus_transport/budget/sizes.py", "return self.blocks is None and not self.aligned and", "return not self.aligned and"),
    ("two blocks of the target fed by one", f"{DEPTHS}test_a_file_that_is_no_pairing_is_refused_before_anything_runs"
     "[[0, 1, 1, 2]]", "theseus_transport/alignment/restored.py", "if after <= before]", "if after < before]"),
    ("the effect in the source's units", by_hand("llama"), STREAMS,
     "(other / own) ** 0.5 if own > 0 else 0.0)", "1.0)"),
    ("the effect behind the block wanted behind attention", by_hand("llama"), STREAMS,
     '        if layer.role != "output" or visit.source is None:\n            return self.tuned[i]\n',
     "        if True:\n            return self.tuned[i]\n"),
    ("what is there not asked of the target", by_hand("llama"), STREAMS,
     "update(read, tuned, own, after, other,", "update(read, tuned, own, other, other,"),
    ("a fit that what follows does not see", by_hand("llama"), STREAMS,
     "        self._of_updated.forget(*self._update.stored_in(layer.name))\n", ""),
    ("the map behind the block used behind attention", by_hand("llama"), EFFECT,
     'return f"{layer.block}.mlp" if layer.role == "output" else pairs.after(layer.block)',
     "return pairs.after(layer.block)"),
    ("no bias fitted", by_hand("gpt2"), WRITER,
     'planned is None and "bias" in stored', "False"),
    ("a mean over features that LayerNorm does not see fitted", by_hand("gpt2"), STREAMS,
     'self._centred = solver.pairs.target.family.norm == "layer"', "self._centred = False"),
    ("fits by rows that nothing reads",
     "tests/streaming/test_streams.py::test_behind_the_last_block_fits_are_of_the_token_that_is_read", STREAMS,
     "if b is not None and self._solver.pairs.reads_one_token(b):", "if False:"),
    ("cut behind all fits", "tests/streaming/test_streams.py::test_what_follows_a_fit_sees_it_as_it_was_cut[llama]", FITS,
     "self.made[layer] = Fitted(factors=Factors(a, b / how.scaling, how.scaling))",
     'self.made[layer] = type("Whole", (Fitted,), {"dense": lambda own, name, rows=None: {f"{name}.weight": total}})(\n'
     "                factors=Factors(a, b / how.scaling, how.scaling))"),
    ("cut in no metric behind a fit",
     "tests/streaming/test_streams.py::test_what_follows_a_fit_sees_it_as_it_was_cut[gpt2]", FITS,
     "low_rank(total, normal, rho, how.rank, bias=False)", "low_rank(total, normal, 1e9, how.rank, bias=False)"),
    ("rows held out fitted", WHOLE, STREAMS,
     "                if i == self._loop.held:\n                    continue\n                after =",
     "                if False:\n                    continue\n                after ="),
    ("behind a prior nothing fitted", "tests/exact/test_effect.py::test_every_writer_is_fitted_and_nothing_is_missing"
     "[llama-identity-new-gains-linear]", STREAMS, "            if layer.name in self._fits:\n", "            if False:\n"),
    ("a factor behind a writer left in its fit", "tests/exact/test_inexact.py::test_fits_without_a_prior_leave_as_much_as_stated"
     "[dino-linear]", WRITER, "Fit(found.weight / factor[:, None],", "Fit(found.weight,"),
    ("a prior that its fit forgets",
     "tests/streaming/test_streams.py::test_a_fit_behind_a_prior_sees_what_the_prior_moved[llama]", FITS,
     "total = weight if moved is None else weight + moved.to(weight)", "total = weight"),
    ("the last write point of the streams forgotten between processes",
     "tests/streaming/test_stream_jobs.py::test_an_interrupted_run_goes_on_to_the_same_bytes[effect at a block more]",
     STREAMS, 'self._point = WritePoint(tensors["streams/q"], state["scale"])', "pass"),
    ("what arrived forgotten between processes",
     "tests/streaming/test_stream_jobs.py::test_an_interrupted_run_goes_on_to_the_same_bytes[effect]", STREAMS,
     '[Arrived(*one) for one in state["arrived"]]', "[]"),
    ("the judgement not noted",
     "tests/streaming/test_stream_jobs.py::test_a_run_interrupted_just_before_its_end_goes_on_to_the_same_bytes"
     "[in memory-effect]", PASSAGE,
     '            self.work.note({**self.work.state, "streams": streams.state()[0]})\n', "            pass\n"),
    ("a head made again of hidden states that are gone",
     "tests/streaming/test_stream_jobs.py::test_a_run_interrupted_just_before_its_end_goes_on_to_the_same_bytes"
     "[in memory-effect with a head]", PASSAGE,
     'self.work.commit({**self.work.state, "sink": self.sink.state()}, dict(self.work.tensors))', "pass"),

    # --- what runs beside the bases ----------------------------------------------------------------------------------
    ("products of an adapter without their scaling", f"{CHANGED}an_adapter_is_its_base_and_its_product_as_peft_merges_them[lora]",
     MERGED, "addmm_(left[rows], right, alpha=scaling)", "addmm_(left[rows], right)"),
    ("what is left behind on request run all the same", f"{CHANGED}what_is_left_behind_on_request_is_the_bases", WEIGHTS,
     "if self._like(name, own) and not left(family.canonical(name))", "if self._like(name, own)"),
    ("a head of another task run", f"{CHANGED}a_tensor_of_another_shape_stays_the_bases", WEIGHTS,
     "if self._like(name, own) and", "if"),
    ("rows that a tune added run", f"{CHANGED}rows_that_a_tune_added_to_a_vocabulary_are_no_rows_of_the_base", WEIGHTS,
     " if shape == shape_of(self.tensors, own) else self.rows(name, slice(0, shape[0]))", ""),
    ("a table that grew taken for another tensor", f"{CHANGED}rows_that_a_tune_added_to_a_vocabulary_are_no_rows_of_the_base",
     WEIGHTS, "base == tuned or grown or (base[1:] == tuned[1:] and tuned[0] == self._rows)", "base == tuned"),
    ("a head of the tune's own not read", "tests/updates/test_merged_tied.py::test_moved_to_the_same_network_it_is_the_tune[head]",
     WEIGHTS, "tuned.get(table if joined else head)", "tuned.get(table)"),
    ("rows that a tune lost moved", "tests/jobs/test_vocabularies.py::test_common_rows_move_and_pads_stay[290-300-300]",
     "theseus_transport/streaming/predictions.py", "min(head.outputs, tuned.outputs)", "head.outputs"),
    ("rows of a tile added to others", f"{CHANGED}the_update_is_added_to_its_base_whole_or_by_rows[7]", WEIGHTS,
     "+= value[index[first:last] - tile.start]", "+= value[index[first:last] - index[first]]"),
    ("what was fitted kept as it was", f"{CHANGED}a_block_is_made_once_until_it_is_forgotten", WEIGHTS,
     "            self._made.pop(name, None)\n", "            pass\n"),
    ("one strength for all", f"{CHANGED}another_strength_is_so_much_of_the_update[2.0]", WEIGHTS,
     "torch.lerp(before.to(after), after, self._alpha)", "torch.lerp(before.to(after), after, 1.0)"),

    # --- what is wanted behind the last block ------------------------------------------------------------------------
    ("the last write point not corrected", f"{LAST_POINT}where_heads_agree_they_say_what_is_wanted_behind_the_last_block",
     STREAMS, 'if point == "final" and', "if False and"),
    ("corrected by heads of nothing in common", f"{LAST_POINT}heads_that_disagree_leave_the_map_as_it_is", LAST,
     "AGREE = 0.1 ", "AGREE = -2.0 "),
    ("a common shift of logits wanted", f"{LAST_POINT}one_network_in_two_writings_is_left_alone", LAST,
     "    for sums, mean in zip((cross, gram), means, strict=True):", "    for sums, mean in zip((cross,), means[:1], strict=True):"),
    ("gains left out of heads", f"{LAST_POINT}one_network_in_two_writings_is_left_alone", LAST,
     ".double().cpu() * gain for window", ".double().cpu() for window"),
    ("the map corrected the wrong way", f"{LAST_POINT}few_outputs_change_as_the_sources_and_all_else_stays", LAST,
     "self.cross.to(q) - q @ self.gram.to(q)", "q @ self.gram.to(q) - self.cross.to(q)"),
    ("all tokens alike behind the last block", f"{LAST_POINT}outputs_count_by_how_often_they_occur_and_none_for_nothing",
     LAST, "(1 - UNSEEN) * counts.double() / total + UNSEEN * uniform", "uniform"),

    # --- what is said of it ------------------------------------------------------------------------------------------
    ("the source's tune taken away from what is wanted", f"{JUDGED}all_of_it_is_the_targets_logits_changed_as_the_sources",
     VERDICT, "before + source.target.logits(outputs) - source.source.logits(outputs)",
     "before - source.target.logits(outputs) + source.source.logits(outputs)"),
    ("base and tune exchanged", f"{JUDGED}between_copies_of_a_model_all_of_it_arrives_at_strength_one[lora]", PREDICTIONS,
     "effect = Pair(base, self._of(0, head, self._tuned[held], self._tuned.weights, held))",
     "effect = Pair(self._of(0, head, self._tuned[held], self._tuned.weights, held), base)"),
    ("the worst strength taken", f"{JUDGED}between_copies_of_a_model_all_of_it_arrives_at_strength_one[lora]", ALPHA,
     "return max(removed, key=", "return min(removed, key="),
    ("one strength tried for all",
     f"{JUDGED}what_is_said_of_a_strength_is_so_of_the_model_that_is_written_at_it[0.5]", STREAMS,
     "Scaled(base, self._of_updated, alpha) for", "Scaled(base, self._of_updated, 1.0) for"),
    ("what is missing told for its opposite",
     f"{JUDGED}between_copies_of_a_model_all_of_it_arrives_at_strength_one[lora]", STREAMS,
     "1 - float((wanted - change)", "1 - float((wanted + change)"),
    ("earlier tiles kept in their own units", f"{JUDGED}shares_are_those_of_divergences_in_one_piece[200.0]", VERDICT,
     "gaps[alpha] = gaps[alpha] * faded + ", "gaps[alpha] = gaps[alpha] + "),
    ("a score judged as a class", f"{JUDGED}heads_of_other_classes_or_of_one_do_not", VERDICT,
     "if outputs[0] == outputs[1] > 1 and", "if outputs[0] == outputs[1] and"),
    ("rows of two tokenizers compared", f"{JUDGED}vocabularies_of_two_tokenizers_tell_nothing", VERDICT,
     "and (rows.source is None or rows.source.weight is None)", "and True"),
    ("a tied head overlooked", f"{JUDGED}heads_of_one_vocabulary_tell_tied_or_not", VERDICT,
     'tied = purpose == "vocabulary" and base.geometry.tied', "tied = False"),
]
