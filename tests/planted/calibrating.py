"""Bugs in how calibration is sampled, mixed and judged: (name, test, file, old text, new text)."""

SAMPLING, SELF, MIXED = (f"tests/{name}.py::" for name in
                         ("calibration/test_sampling", "jobs/test_self_text", "calibration/test_mixed"))  # fmt: skip

CALIBRATION_BUGS = [
    ("text sampled at another temperature", f"{SAMPLING}test_tokens_are_drawn_from_the_whole_distribution_at_temperature_one",
     "theseus_transport/calibration/sampling.py", "temperature=1.0", "temperature=2.0"),
    ("padding in front of prompts read", f"{SAMPLING}test_prompts_of_many_lengths_go_on_as_each_would_alone",
     "theseus_transport/calibration/sampling.py", "[[0] * (width - len(start)) + ", "[[1] * (width - len(start)) + "),
    ("text sampled by no seed", f"{SAMPLING}test_the_same_seed_says_the_same_and_leaves_chance_as_it_was",
     "theseus_transport/calibration/sampling.py", "manual_seed(seed), _ends", "manual_seed(0), _ends"),
    ("what follows the end kept", f"{SAMPLING}test_a_chat_ends_with_its_first_end",
     "theseus_transport/calibration/sampling.py", "(i + 1 for i, token", "(i + 2 for i, token"),
    ("an answer left in the prompt", "tests/calibration/test_prompts.py::test_a_record_asks_and_its_answer_is_left_out",
     "theseus_transport/calibration/formats.py", "        turns.pop()\n", "        break\n"),
    ("a chat told as if it were over", "tests/calibration/test_prompts.py::test_a_record_asks_and_its_answer_is_left_out",
     "theseus_transport/calibration/prompts.py", "asking=True", "asking=False"),
    ("little text drowned in general text", f"{MIXED}test_little_text_is_not_drowned_in_general_text",
     "theseus_transport/calibration/mixed.py", "first.tokens * mix / (1 - mix)", "tokens_wanted"),
    ("kinds of text one after the other", f"{MIXED}test_both_kinds_alternate",
     "theseus_transport/calibration/mixed.py", "((i + 0.5) / len(part), k, batch)", "(k, i, batch)"),
    ("few rows not warned of", f"{MIXED}test_rows_that_are_few_for_a_width_and_near_it_are_warned_of[few]",
     "theseus_transport/calibration/advice.py", "rows < 2 * known[-1]", "rows < known[-1]"),
    ("the base says the calibration", f"{SELF}test_the_model_that_writes_is_the_tuned_model[source-lora]",
     "theseus_transport/jobs/self_text.py", "Merged(source, Adapter.of(tuned), family)", "source"),
    ("the whole tune not planned", f"{SELF}test_memory_for_the_whole_tune_is_planned_and_refused_with_a_cure",
     "theseus_transport/jobs/calibrating.py", "loading=found.loading + ", "loading=0 * found.loading + 0 * "),
    ("a head over a tied base lost", f"{SELF}test_a_head_trained_over_a_tied_base_writes",
     "theseus_transport/jobs/self_text.py", "and head in tensors.changed)", "and False)"),
]  # fmt: skip
