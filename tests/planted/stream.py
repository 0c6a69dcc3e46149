"""Bugs to plant in the block loop, as in `bugs`: (name, test, file, old, new)."""


def interrupted(case: str) -> str:
    return f"tests/test_stream.py::test_an_interrupted_run_goes_on_to_the_same_bytes[{case}]"


def written(case: str) -> str:
    return f"tests/test_stream.py::test_a_job_writes_what_whole_models_give[{case}]"


def abused(test: str) -> str:
    return f"tests/test_stream_abuse.py::{test}"


BASES, JOB, PASSAGE, PLAN, SINKS, STREAM, WORKPLACE = (
    f"theseus_transport/{name}.py" for name in ("bases", "job", "passage", "plan", "sinks", "stream", "workplace")
)

# fmt: off
STREAM_BUGS = [
    ("hidden states recorded before they are saved", interrupted("full"), PASSAGE,
     'record = {"planner": state, "sink": self.sink.state(), "hidden": loop.record(), ',
     'record = {"planner": state, "sink": self.sink.state(), "hidden": self.work.state.get("hidden", loop.record()), '),
    ("a visit skipped on going on", interrupted("full"), PASSAGE,
     "        visits, loop = self._visits(), None\n",
     "        visits, loop = self._visits(), None\n"
     "        visits[self.work.step : self.work.step + bool(self.work.step)] = []\n"),
    ("maps dropped while tensors wait for them",
     "tests/test_stream.py::test_rank_poor_first_maps_are_completed_at_the_end", PASSAGE,
     "planner.plan.maps.keys() - self.sink.wanted() - ", "planner.plan.maps.keys() - "),
    ("the batch held out added up too", written("full"), STREAM,
     "        if i == self._held:\n", "        if False:\n"),
    ("hidden states not advanced", "tests/test_stream.py::test_the_loop_sees_what_whole_models_show[llama]", STREAM,
     "        self.hidden.put(i, state)\n", "        self.hidden.put(i, self.hidden[i])\n"),
    ("rounding forgotten between processes", interrupted("full"), SINKS,
     "            out.rounding.sums.update(sums)\n", "            pass\n"),
    ("another calibration resumed", abused("test_another_calibration_is_refused_by_name"), BASES,
     '{"calibration": data.fingerprint, "carried out"', '{"carried out"'),
    ("another batch size resumed", abused("test_a_changed_option_is_refused_by_name[batch size]"), PLAN,
     '"batch size": self.batch_size, ', ""),
    ("another recipe resumed", abused("test_a_changed_option_is_refused_by_name[recipe]"), JOB,
     '"recipe": asdict(recipe), **options_of', "**options_of"),
    ("other maps resumed", abused("test_other_maps_are_refused_by_name"), JOB,
     'known["MAPS"] = ', 'known["MAPS"] = 0 and '),
    ("more asked for than would do", "tests/test_budgets.py::test_the_least_of_both_memories_does[qwen-False]", PLAN,
     "key=lambda plan: (len(plan[0]), sum(", "key=lambda plan: (0, -sum("),
]
