"""Bugs to plant in what heads share and in how numbers are kept, as in `bugs`: (name, test, file, old, new)."""

SHARES = "tests/recipes/test_shares.py::test_"
HEADS, IMAGES, PRECISION = (
    f"theseus_transport/{name}.py" for name in ("recipes/coherent_heads", "calibration/images", "precision")
)

# fmt: off
NUMBER_BUGS = [
    ("copies weighted alike, fit or not", "tests/exact/test_llama.py::test_exact[llama-own-heads-linear]", HEADS,
     "share[same], fit[same] = _shared(g, r, scale[same], floor)", "share[same] = 1 / len(same)"),
    ("query heads left over counted in their group's map",
     "tests/exact/test_llama.py::test_exact[llama-own-queries-gains]", HEADS,
     "counted = per_head * pairing.own.to(per_head)", "counted = per_head * torch.ones_like(pairing.own).to(per_head)"),
    ("quiet heads as good as loud ones", f"{SHARES}a_quiet_head_gets_little_of_what_stays_unexplained", HEADS,
     "least(rest * (scale[best] / scale) ** 2)", "least(rest * (scale[best] / scale) ** 0)"),
    ("queries of heads that do not fit moved", f"{SHARES}heads_of_the_targets_own_stay_as_they_are", HEADS,
     "_ratios(e_query, recipe), fit))",
     "_ratios(e_query, recipe), torch.ones_like(fit)))"),
    ("values of heads that do not fit moved", f"{SHARES}heads_of_the_targets_own_stay_as_they_are", HEADS,
     "blocks(polar, scale * fit_kv)", "blocks(polar, scale)"),
    ("models of 16 bits run as they are",
     "tests/updates/test_precision.py::test_an_alignment_is_that_of_the_same_checkpoints_in_float32[llama-2-torch.bfloat16]",
     "theseus_transport/models/precision.py", "if tensor.dtype in SHORT and not tensor.is_meta:", "if False:"),
    ("rotary tables as a cast left them",
     "tests/updates/test_precision.py::test_an_alignment_is_that_of_the_same_checkpoints_in_float32[llama-2-torch.bfloat16]",
     "theseus_transport/models/precision.py", "exact.float() if known else", "exact.float() if False else"),
    ("a sum rounded twice",
     "tests/updates/test_precision.py::test_adding_rounds_once_and_says_what_that_loses[torch.bfloat16]",
     "theseus_transport/models/precision.py", "wide + by).to(into.dtype)", "wide + by.to(into.dtype)).to(into.dtype)"),
    ("16 bits clipped at 255", "tests/calibration/test_images.py::test_numbers_of_any_depth_are_scaled[I;16]", IMAGES,
     'if picture.mode[0] in "IF" else', "if False else"),
]
