"""Bugs to plant in the recipe `effect` as it streams, as in `bugs`: (name, test, file, old, new)."""

STREAMS, LOOP, ALPHA, EFFECT, FITS, MERGED, WEIGHTS, VERDICT, LAST, PASSAGE = (
    f"theseus_transport/{name}.py"
    for name in (
        "streaming/streams",
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


WHOLE = "tests/streaming/test_stream_jobs.py::test_a_job_writes_what_whole_models_give[effect]"

RIDGE = "tests/streaming/test_held_out_ridge.py::"
DEPTHS = "tests/jobs/test_depths.py::"

# fmt: off
EFFECT_BUGS = [
    ("samples that judge counted batch by batch",
     f"{RIDGE}test_the_penalty_is_the_one_with_the_least_error_on_every_fourth_sample", STREAMS,
     "                count += len(after)\n", ""),
    ("those that judge left out of the fit",
     f"{RIDGE}test_the_penalty_is_the_one_with_the_least_error_on_every_fourth_sample", STREAMS,
     "normal = reduce(add, normals)", "normal = normals[0]"),
    ("fitted though it helps on no other sample",
     f"{RIDGE}test_where_an_effect_cannot_be_foretold_nothing_is_fitted", STREAMS,
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
     "        self._of_updated.forget(*(slot.stored for slot in stored.values()))\n", ""),
    ("the map behind the block used behind attention", by_hand("llama"), EFFECT,
     'return f"{layer.block}.mlp" if layer.role == "output" else pairs.after(layer.block)',
     "return pairs.after(layer.block)"),
    ("no bias fitted", by_hand("gpt2"), STREAMS,
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
]
