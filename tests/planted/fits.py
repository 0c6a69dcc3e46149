"""Bugs to plant in fits of effects and in cuts to a rank, as in `bugs`: (name, test, file, old, new)."""

RIDGE, LEADING, EFFECTS, RANKS = (
    f"theseus_transport/{name}.py"
    for name in ("linalg/ridge", "linalg/leading", "activations/effects", "updates/ranks")
)
FITS, DIRECTIONS, MOMENTS, CUTS = (
    f"tests/{name}.py::test_"
    for name in ("linalg/test_ridge", "linalg/test_leading", "activations/test_effects", "updates/test_ranks")
)

# fmt: off
FIT_BUGS = [
    ("a bias that is penalised", f"{FITS}a_fit_is_least_squares_of_rows_with_the_penalty_below_them[0.01-True]", RIDGE,
     "work.addr_(normal.input_sum, mean, alpha=-1)", "work.addr_(normal.input_sum, mean, alpha=-0.9)"),
    ("a penalty in no units", f"{FITS}a_penalty_follows_the_units_of_the_inputs[False]", RIDGE,
     "add_(tried * trace / len(work))", "add_(tried)"),
    ("a penalty by the energy, not about the mean",
     f"{FITS}a_fit_is_least_squares_of_rows_with_the_penalty_below_them[0.01-True]", RIDGE,
     "trace = float(about.sum())", "trace = float(energy.sum())"),
    ("constant inputs fitted", f"{FITS}nothing_active_is_no_update", RIDGE,
     "if trace <= SILENT * float(energy.sum()):", "if trace == 0:"),
    ("rho that does not rise", f"{FITS}a_gram_that_rounding_made_indefinite_is_fitted_more_gently", RIDGE,
     "while rho < LARGEST:", "while False:"),
    ("the first Gram kept between tries", f"{FITS}a_gram_that_rounding_made_indefinite_is_fitted_more_gently", RIDGE,
     "work.copy_(normal.gram)", "work.copy_(normal.gram) if tried == rho else None"),
    ("strength by the rows that were fitted",
     f"{FITS}the_chosen_strength_has_the_least_error_on_held_out_rows[10.0-True]", RIDGE,
     "_gain(found, held)", "_gain(found, fit)"),
    ("strength that takes the bias for its opposite",
     f"{FITS}the_chosen_strength_has_the_least_error_on_held_out_rows[100.0-True]", RIDGE,
     "wanted += float(found.bias @ held.output_sum)", "wanted -= float(found.bias @ held.output_sum)"),
    ("what a bias shows counted without its own size",
     f"{FITS}the_chosen_strength_has_the_least_error_on_held_out_rows[100.0-True]", RIDGE,
     "held.count * found.bias", "0 * found.bias"),
    ("an update at any price", f"{FITS}no_update_where_held_out_rows_want_the_opposite[False]", RIDGE,
     "if gain > ROUNDING * size and (best is None", "if (best is None"),
    ("combinations that differ between fit and held-out rows", f"{FITS}wide_outputs_are_judged_by_a_few_random_combinations[False]", RIDGE,
     "return Normal(normal.gram, normal.cross @ mix,", "return Normal(normal.gram, normal.cross @ mix.roll(normal.count),"),
    ("a cut in no metric", f"{FITS}the_metric_decides_what_is_cut", RIDGE,
     "seen = weight.mT if factor is None", "seen = weight.mT if True"),
    ("a cut by the factor's other triangle",
     f"{FITS}a_cut_is_the_whitened_svd_and_no_other_product_is_nearer[1-False]", RIDGE,
     "else factor.mT @ weight.mT", "else factor @ weight.mT"),
    ("not iterated", f"{DIRECTIONS}iterated_directions_are_nearly_the_leading_ones", LEADING,
     "for _ in range(ITERATIONS):", "for _ in range(0):"),
    ("iterated without orthonormalising", f"{DIRECTIONS}a_matrix_of_that_rank_is_its_leading_directions[wide-iterated]",
     LEADING, "q = torch.linalg.qr(y.mT @ torch.linalg.qr(y @ q)[0])[0]", "q = y.mT @ (y @ q)"),
    ("all of the norm in one factor", f"{DIRECTIONS}balanced_factors_have_the_same_product_and_one_norm", LEADING,
     "root = (rows * columns).sqrt()", "root = columns"),
    ("signs as they come", f"{CUTS}factors_share_the_norm_and_signs_are_fixed", LEADING,
     "torch.where(largest < 0, -1.0, 1.0)", "torch.where(largest < 0, 1.0, 1.0)"),
    ("the source's mean left in", f"{MOMENTS}what_all_features_share_is_no_effect_behind_a_layer_norm", EFFECTS,
     "(removed(source) @ q", "(source @ q"),
    ("the target's mean left in", f"{MOMENTS}what_all_features_share_is_no_effect_behind_a_layer_norm", EFFECTS,
     "return removed(scale * (removed(source) @ q.to(source)) - target)",
     "return removed(scale * (removed(source) @ q.to(source))) - target"),
    ("what is there wanted again", f"{MOMENTS}what_is_missing_is_what_rows_say[False]", EFFECTS,
     "q.to(source)) - target)", "q.to(source)))"),
    ("tokens counted in front of the mixing", f"{MOMENTS}mixing_is_of_differences_and_counts_its_rows", EFFECTS,
     "self.count += len(inputs) if target_mixing is None else target_mixing.rows", "self.count += len(inputs)"),
    ("a cut of one factor alone", f"{CUTS}no_product_of_that_rank_is_nearer_than_a_cut[few-3]", RANKS,
     "core = inner @ outer.mT", "core = inner @ outer"),
    ("factors that fit cut all the same", f"{CUTS}factors_that_fit_are_returned_themselves[4]", RANKS,
     "if len(factors.a) <= rank:", "if len(factors.a) < rank:"),
    ("the share of norms, not of squares", f"{CUTS}no_product_is_nearer_to_a_whole_update_and_its_share_is_kept", RANKS,
     "share = float(s.square().sum()) / total", "share = float(s.sum()) / total"),
]
