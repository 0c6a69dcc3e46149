"""Bugs to plant in the block loop, as in `bugs`: (name, test, file, old, new)."""


def interrupted(case: str) -> str:
    return f"tests/streaming/test_stream_jobs.py::test_an_interrupted_run_goes_on_to_the_same_bytes[{case}]"


def written(case: str) -> str:
    return f"tests/streaming/test_stream_jobs.py::test_a_job_writes_what_whole_models_give[{case}]"


def abused(test: str) -> str:
    return f"tests/streaming/test_stream_abuse.py::{test}"


BASES, JOB, PASSAGE, PLAN, SINKS, STREAM, WORKPLACE = (
    f"theseus_transport/{name}.py"
    for name in (
        "jobs/bases",
        "jobs/transport_job",
        "streaming/passage",
        "budget/plan",
        "streaming/sinks",
        "streaming/loop",
        "files/run_folder",
    )
)

# fmt: off
STREAM_BUGS = [
    ("hidden states recorded before they are saved", interrupted("full"), PASSAGE,
     'record = {"solver": state, "sink": self.sink.state(), "hidden": loop.record(), ',
     'record = {"solver": state, "sink": self.sink.state(), "hidden": self.work.state.get("hidden", loop.record()), '),
    ("a visit skipped on going on", interrupted("full"), PASSAGE,
     "        visits, loop = self._visits(), None\n",
     "        visits, loop = self._visits(), None\n"
     "        visits[self.work.step : self.work.step + bool(self.work.step)] = []\n"),
    ("maps dropped while tensors wait for them",
     "tests/streaming/test_stream_jobs.py::test_rank_poor_first_maps_are_completed_at_the_end", PASSAGE,
     "solver.ruleset.maps.keys() - self.sink.wanted() - ", "solver.ruleset.maps.keys() - "),
    ("the batch held out added up too", written("full"), STREAM,
     "        if i == self.held:\n", "        if False:\n"),
    ("hidden states not advanced", "tests/streaming/test_loop.py::test_the_loop_sees_what_whole_models_show[llama]", STREAM,
     "        self.hidden.put(i, state)\n", "        self.hidden.put(i, self.hidden[i])\n"),
    ("rounding forgotten between processes", interrupted("full"), SINKS,
     "            out.rounding.sums.update(sums)\n", "            pass\n"),
    ("another calibration resumed", abused("test_another_calibration_is_refused_by_name"), BASES,
     '{"calibration": data.fingerprint, "carried out"', '{"carried out"'),
    ("another batch size resumed", abused("test_a_changed_option_is_refused_by_name[batch size]"), "theseus_transport/budget/choice.py",
     '"batch size": self.batch_size, ', ""),
    ("another recipe resumed", abused("test_a_changed_option_is_refused_by_name[recipe]"), JOB,
     'asdict(recipe) | {"prior": job.recipe.prior}', "0"),
    ("other maps resumed", abused("test_other_maps_are_refused_by_name"), JOB,
     '{"MAPS": read_manifest(job.maps)["files"]} if', '{"MAPS": 0} if'),
    ("more asked for than would do", "tests/budget/test_budgets.py::test_the_least_of_both_memories_does[qwen-False]", PLAN,
     "key=lambda plan: (len(plan[0]), sum(", "key=lambda plan: (0, -sum("),
]

# What is sent to a device, on a simulated one.
UPLOAD, WEIGHTS = (f"theseus_transport/{name}.py" for name in ("streaming/upload", "streaming/window"))
PIECES, RINGS, WAITS, ROOM, KEPT, FREED, FAILED, SENT = (
    f"tests/streaming/test_upload.py::test_{name}"
    for name in (
        "bits_arrive_in_pieces[torch.float32]",
        "a_buffer_is_filled_again_only_once_it_was_copied",
        "computing_waits_for_what_it_uses",
        "no_more_than_two_blocks_are_on_the_device[torch.bfloat16]",
        "more_blocks_than_slots_are_not_kept",
        "what_is_let_go_is_freed_on_the_device[release]",
        "a_copy_that_failed_is_told_where_it_is_wanted",
        "what_was_sent_ahead_is_not_sent_again[torch.float32]",
    )
)
STREAM_BUGS += [
    ("a buffer filled while it is copied", RINGS, UPLOAD,
     "                    buffer.copied.synchronize()\n", "                    pass\n"),
    ("every copy waited for", RINGS, UPLOAD,
     "                buffer.copied = arrived = self._machine.copy(filled, into)\n",
     "                buffer.copied = arrived = self._machine.copy(filled, into)\n"
     "                arrived.synchronize()\n"),
    ("computing does not wait for weights", WAITS, UPLOAD,
     "        self._machine.use(tensor, arrived)\n", ""),
    ("the end of the last piece not sent", PIECES, UPLOAD,
     "self._machine.copy(filled, into)", "self._machine.copy(filled[:-1], into[:-1])"),
    ("weights converted on their way", PIECES, UPLOAD,
     "        return tensor.to(dtype)\n", "        return tensor.to(torch.bfloat16).to(dtype)\n"),
    ("a block sent while the last but one is computed with", ROOM, UPLOAD,
     "                slot.room.synchronize()\n", ""),
    ("what was taken is kept", WAITS, UPLOAD,
     "slot.sent.pop(name) for slot", "slot.sent[name] for slot"),
    ("three slots", KEPT, UPLOAD, "\nSLOTS = 2 ", "\nSLOTS = 3 "),
    ("what fell out of a slot stays", KEPT, UPLOAD, "            old.sent.clear()\n", "            pass\n"),
    ("sent to a slot that is gone", KEPT, UPLOAD,
     "if name in self._names and slot in self._slots:", "if name in self._names:"),
    ("what is never taken sent", "tests/streaming/test_upload.py::test_only_what_will_be_taken_is_sent", UPLOAD,
     "if name in self._names and slot in self._slots:", "if slot in self._slots:"),
    ("a release leaves what was sent", FREED, WEIGHTS, "            self._upload.drop(gone)\n", "            pass\n"),
    ("a copy that failed goes unsaid", FAILED, WEIGHTS,
     "            send(name, tensor)\n",
     "            try:\n                send(name, tensor)\n            except RuntimeError:\n                pass\n"),
    ("nothing sent ahead", "tests/streaming/test_upload.py::test_only_what_will_be_taken_is_sent", WEIGHTS,
     "                    send = self._upload.ahead()\n", "                    pass\n"),
    ("what was sent ahead sent again", SENT, UPLOAD,
     "return self.bring(tensor, dtype) if sent is None else self._used(*sent, dtype)",
     "return self.bring(tensor, dtype)"),
    ("a ring for every tensor", PIECES, UPLOAD, "            if self._ring is None:\n", "            if True:\n"),
    ("copies on the CPU", "tests/streaming/test_upload.py::test_on_the_cpu_weights_share_the_window_s_memory", UPLOAD,
     "return tensor.to(self._device, dtype) if", "return tensor.to(self._device, dtype, copy=True) if"),
]
