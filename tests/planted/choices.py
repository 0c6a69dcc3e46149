"""Bugs to plant in how a run is carried out, and in what a plan counts, as in `bugs`: (name, test, file, old, new)."""

HALVES_SHOW = "tests/streaming/test_half_blocks.py::test_halves_show_what_whole_blocks_do[llama]"
ADAPTER = "tests/budget/test_choices.py::test_a_plan_counts_the_maps_that_an_adapter_needs"
FILES = "tests/budget/test_choices.py::test_passes_before_the_loop_keep_hidden_states_in_files"


def room(what: str) -> str:
    return f"tests/budget/test_choices.py::test_room_is_checked_for_what_is_copied_at_the_end[{what}]"


ALIGN_JOB, BASES, CAPTURE, DEPTH, HALVES, JOB, PASSAGE, SIZES = (
    f"theseus_transport/{name}.py"
    for name in (
        "jobs/align_job",
        "jobs/bases",
        "activations/capture",
        "alignment/block_pairing",
        "streaming/half_blocks",
        "jobs/prepared",
        "streaming/passage",
        "budget/sizes",
    )
)

# fmt: off
CHOICE_BUGS = [
    ("attention added twice", HALVES_SHOW, "theseus_transport/streaming/stand_ins.py",
     "zero = torch.zeros_like(hidden_of(args, kwargs))", "zero = hidden_of(args, kwargs)"),
    ("what the first half saw forgotten", HALVES_SHOW, CAPTURE,
     "own if before is None else {**before, **own}", "own"),
    ("the weights of both halves for one",
     "tests/streaming/test_half_blocks.py::test_each_half_has_the_weights_of_its_layers_alone[gpt2]", HALVES,
     "for each in HALVES if half not in (None, each)", "for each in HALVES if half not in (None, *HALVES)"),
    ("the second half as if attention returned one part",
     "tests/streaming/test_half_blocks.py::test_halves_show_what_whole_blocks_do[gpt2]", HALVES,
     "self._parts = len(result) if isinstance(result, tuple) else 0", "self._parts = 1"),
    ("every space counted", ADAPTER, SIZES,
     "for name in filter(self._uses, widths):", "for name in widths:"),
    ("spaces behind norms not counted", ADAPTER, "theseus_transport/budget/needs.py",
     "needed(solver, keys) | behind_norms | frozenset(keys or ())", "frozenset()"),
    ("samples that are not there counted", "tests/budget/test_choices.py::test_a_plan_counts_the_samples_there_are",
     "theseus_transport/calibration/extent.py", "samples, one = len(drawn_rows(", "samples, one = wanted + len(drawn_rows("),
    ("blocks paired in memory", FILES, "theseus_transport/streaming/block_pairing.py", "with temporary(folder) as place:", "with temporary(None) as place:"),
    ("the sum over depth in memory", FILES, PASSAGE,
     "with temporary(folder) as place:", "with temporary(None) as place:"),
    ("maps of a portion in another order", "tests/recipes/test_together.py::test_maps_of_one_shape_are_made_together[llama]",
     "theseus_transport/recipes/solver.py", "torch.stack(list(crosses))", "torch.stack(crosses[::-1])"),
    ("maps of a device one by one", "tests/recipes/test_together.py::test_maps_of_one_shape_are_made_together[llama]",
     "theseus_transport/recipes/coherent.py", "[behind_norms] if together else", "[behind_norms] if False else"),
    ("no room for maps left out", room("align"), ALIGN_JOB,
     "room = 2 * bases.bytes_of_maps", "room = bases.bytes_of_maps"),
    ("no room for what did not change", room("delta"), JOB, 'twice = 2 if inputs.kind == "delta" else 1', "twice = 1"),
    ("no room for maps beside the output", room("match"), JOB,
     "if maps_first else 0\n", "if False else 0\n"),
    ("hidden states sought in the folder now named",
     "tests/budget/test_choices.py::test_hidden_states_are_found_where_the_run_began[folders0]", PASSAGE,
     'return self._recorded(Path(self.work.state["folder"]))', 'return (self.folder or self.work.folder) / "hidden"'),
]
