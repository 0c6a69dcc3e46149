"""Bugs in what keeps files of others from doing harm."""

LOADING, OWN, TERMINAL = (
    "tests/models/test_loading.py::",
    "tests/files/test_own_folders.py::",
    "tests/cli/test_terminal.py::",
)
HOSTILE_BUGS = [
    ("the user asked whether a tokenizer's code may run",
     f"{LOADING}test_planted_code_never_runs_whatever_stdin_says[tokenizer_config.json]",
     "theseus_transport/models/loading.py", '"trust_remote_code": False}', '"trust_remote_code": None}'),
    ("links followed out of a folder", f"{LOADING}test_a_link_that_leads_out_is_refused[tokenizer.json]",
     "theseus_transport/files/headers.py", "if not any(leads.is_relative_to(root) for root in allowed):", "if False:"),
    ("kernels that a config names", f"{LOADING}test_a_config_names_no_kernel",
     "theseus_transport/models/loading.py", ' if not key.strip("_").startswith(NEVER_READ)', ""),
    ("a template of any length", f"{LOADING}test_a_template_that_makes_too_much_refuses_those_messages",
     "theseus_transport/calibration/chat_process.py", "if len(text) > longest:", "if False:"),
    ("a base fetched on a manifest's word", f"{LOADING}test_what_a_file_names_is_not_fetched",
     "theseus_transport/jobs/verify.py", "located(str(reference), download=False)", "located(str(reference))"),
    ("a folder of another user taken", f"{OWN}test_what_is_no_folder_of_ours_is_refused",
     "theseus_transport/files/result_folder.py", " or found.st_uid != os.geteuid()", ""),
    ("a folder removed that a journal names", f"{OWN}test_a_journal_cannot_have_a_folder_removed",
     "theseus_transport/streaming/passage.py", "if not own:", "if False:"),
    ("an edited journal believed", "tests/files/test_run_folder.py::test_damaged_or_hostile_folder_is_refused[digest]",
     "theseus_transport/files/run_record.py", "whole = found == signed(found)", "whole = True"),
    ("escape sequences on the screen", f"{TERMINAL}test_all_that_a_console_prints_or_logs_is_visible",
     "theseus_transport/cli/terminal.py", "Segment(visible(segment.text), segment.style)", "segment"),
    ("names raw in a card", f"{TERMINAL}test_a_card_takes_no_name_raw",
     "theseus_transport/jobs/model_card.py", "else in_page(value))", "else str(value))"),
    ("images of any size decoded", "tests/calibration/test_images.py::test_large_images_are_halved_on_the_way_or_refused_unread",
     "theseus_transport/calibration/images.py", "    if picture.width * picture.height > MAX_PIXELS:", "    if False:"),
]  # fmt: skip
