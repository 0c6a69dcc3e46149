"""Bugs to plant in the CUDA kernels and their host twin, each with the emulated test and build that must turn red."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EmulatedBug:
    """Replace ``old``, which ``file`` holds exactly once, by ``new``; then ``test`` fails in ``build``.

    ``build`` is plain, address or thread, as for ``tests/emulated/run.sh``.
    """

    name: str
    build: str
    test: str
    file: str
    old: str
    new: str


PLAIN, GROUPED, STAGE, PLAN, ROWS, SVD = (
    f"csrc/cuda/{name}"
    for name in (
        "cross_moment.cu",
        "grouped_moment.cu",
        "grouped_stage.cuh",
        "grouped_plan.h",
        "rows.cuh",
        "small_svd.cu",
    )
)
CONTRACT = "csrc/cross_moment.h"
KERNELS, TWIN, TWIN_PRIMITIVES = (
    f"tests/emulated/{name}" for name in ("primitive_kernels.cuh", "twin.h", "twin_primitives.cpp")
)

# fmt: off
BUGS = [
    # --- tensor-core cross-moments: order of memory --------------------------------------------------------------
    EmulatedBug("no barrier between stages", "thread", "bfloat16_shapes", GROUPED,
        "    sync_block();  // for all threads;", "    // for all threads;"),
    EmulatedBug("no barrier before the first split", "thread", "float32_shapes", GROUPED,
        "    sync_block();\n    split_stage(0);", "    split_stage(0);"),
    EmulatedBug("a stage refilled before all have left it", "thread", "accumulators_are_flushed", GROUPED,
        "    sync_block();  // for all threads; and all are done with the stage before, whose place is filled now\n"
        "    start(stage + S::kStages - 1);\n",
        "    start(stage + S::kStages - 1);\n    sync_block();\n"),
    EmulatedBug("parts of two stages in one place", "thread", "accumulators_are_flushed", STAGE,
        "(stage % 2 * 2 + side) * kEach", "side * kEach"),
    EmulatedBug("lax copy wait", "plain", "bfloat16_shapes", GROUPED,
        "S::kStages - 3 : S::kStages - 2>", "S::kStages - 3 : S::kStages - 1>"),
    EmulatedBug("lax copy wait of what is split", "plain", "accumulators_are_flushed", GROUPED,
        "S::kStages - 3 : S::kStages - 2>", "S::kStages - 2 : S::kStages - 2>"),
    EmulatedBug("copies never committed", "plain", "bfloat16_shapes", GROUPED,
        "    copy_commit();\n    look(stage + 1);\n", "    look(stage + 1);\n"),

    # --- tensor-core cross-moments: fragments ----------------------------------------------------------------------
    EmulatedBug("fragments of y swapped", "plain", "every_output_is_where_it_belongs", GROUPED,
        "b[p][j][1] = four[1], b[p][j + 1][0] = four[2]", "b[p][j][1] = four[2], b[p][j + 1][0] = four[1]"),
    EmulatedBug("fragments of x swapped", "plain", "every_output_is_where_it_belongs", GROUPED,
        "k + row + 8 * second, source + 16 * i + 8 * first", "k + row + 8 * first, source + 16 * i + 8 * second"),
    EmulatedBug("rows of an output fragment swapped", "plain", "every_output_is_where_it_belongs", GROUPED,
        "lane / 4 + 8 * (e / 2), 8 * j + lane % 4 * 2 + e % 2", "lane / 4 + 8 * (e % 2), 8 * j + lane % 4 * 2 + e / 2"),
    EmulatedBug("vectors turned on one side only", "plain", "every_output_is_where_it_belongs", GROUPED,
        "return part + turned(k, column / 8, kPanel / 8) * 8;", "return part + k * kPanel + column;"),
    EmulatedBug("products with the low part left out", "plain", "float32_is_as_accurate_as_float32", GROUPED,
        "int order = S::kParts - 1;", "int order = S::kParts == 3 ? 1 : 0;"),
    EmulatedBug("accumulators never flushed", "plain", "accumulators_are_flushed", GROUPED,
        "if ((stage + 1) % (S::kFlush / S::kDepth) == 0 || ", "if ("),

    # --- tensor-core cross-moments: edges --------------------------------------------------------------------------
    EmulatedBug("last stage lost", "plain", "last_row_and_column_count", GROUPED,
        "(end - begin + S::kDepth - 1) / S::kDepth", "(end - begin) / S::kDepth"),
    EmulatedBug("a row too many in the last stage", "plain", "split_over_rows", ROWS,
        "if (row >= rows) return kNoToken;", "if (row > rows) return kNoToken;"),
    EmulatedBug("large numbers rounded to Inf", "plain", "large_float32_stays_finite", STAGE,
        "(rounded & 0x7f800000) == 0x7f800000 ? bits_of(x) : rounded", "rounded"),
    EmulatedBug("last column of a vector lost", "plain", "odd_widths", STAGE,
        "int rest = panel.columns - v * S::kPerVector;", "int rest = panel.columns - 1 - v * S::kPerVector;"),
    EmulatedBug("whole last vector read", "address", "unaligned", STAGE,
        "copy_async(vector, from, valid * static_cast<int>(sizeof(R)));", "copy_async(vector, from, 16);"),
    EmulatedBug("a row too many written", "address", "odd_widths", GROUPED,
        "if (i >= source.columns ||", "if (i > source.columns ||"),
    EmulatedBug("16-byte copies from anywhere", "plain", "unaligned", PLAN,
        "reinterpret_cast<uintptr_t>(side.tokens) % 16 == 0 && side.stride * bytes % 16 == 0", "true"),
    EmulatedBug("an entry out of range taken for none", "plain", "an_entry_out_of_range_is_nan", STAGE,
        "token[pass] == kInvalidToken ? ~0u : 0;", "token[pass] == kInvalidToken ? 0u : 0;"),
    EmulatedBug("the stage's tokens looked up late", "plain", "bfloat16_mixings", GROUPED,
        "    look(stage + 1);\n", "    look(stage);\n"),

    # --- tensor-core cross-moments: who does what ------------------------------------------------------------------
    EmulatedBug("every block takes all sums", "plain", "bfloat16_shapes", GROUPED,
        "if (stage % sharers == my_share)", "if (stage >= 0)"),
    EmulatedBug("last slice not added", "plain", "split_over_rows", GROUPED,
        "slice < group.slices; ++slice", "slice + 1 < group.slices; ++slice"),
    EmulatedBug("workspace a slice short", "address", "split_over_rows", PLAN,
        "take(group.slices * outputs, group.partial)", "take((group.slices - 1) * outputs, group.partial)"),
    EmulatedBug("first block of a group given to the one before", "plain", "groups_share_a_launch", GROUPED,
        "block_index() >= plan.group[g + 1].first_block", "block_index() > plan.group[g + 1].first_block"),
    EmulatedBug("float32 on tensor cores of every GPU", "plain", "who_takes_tensor_cores", GROUPED,
        "return data_centre || format_of(group) != Format::float32;", "return true;"),
    EmulatedBug("energies of all heads added to the first's", "plain", "heads_one_by_one", CONTRACT,
        "side->sum += first, side->energy += first;", "side->sum += first;"),
    EmulatedBug("heads read the first head", "plain", "heads", GROUPED,
        "head * side.width + static_cast<int64_t>(tile) * kPanel, end", "static_cast<int64_t>(tile) * kPanel, end"),
    EmulatedBug("last band taken for a whole one", "plain", "more_tiles_than_a_band", GROUPED,
        "band + inside % height, inside / height", "band + inside % kBand, inside / kBand"),

    # --- plain kernels ---------------------------------------------------------------------------------------------
    EmulatedBug("no barrier before a tile is refilled", "thread", "plain_edges", PLAIN,
        "thread_y + j * kAcross];\n      sync_block();\n", "thread_y + j * kAcross];\n"),
    EmulatedBug("no barrier before sums of warps are added", "thread", "plain_dtypes", PLAIN,
        "  energies[warp * kLanes + lane] = energy;\n  sync_block();", "  energies[warp * kLanes + lane] = energy;"),
    EmulatedBug("last entry of a row lost", "plain", "plain_mixings", ROWS,
        "usable && entry < to; ++entry", "usable && entry + 1 < to; ++entry"),

    # --- small SVD ---------------------------------------------------------------------------------------------------
    EmulatedBug("no barrier between rounds of rotations", "thread", "svd_shapes_float32", SVD,
        "      }\n      sync_block();\n    }\n", "      }\n    }\n"),
    EmulatedBug("no barrier after the columns are loaded", "thread", "svd_shapes_float32", SVD,
        "  sync_block();\n\n  const T tolerance", "\n  const T tolerance"),
    EmulatedBug("no barrier after the order is found", "thread", "svd_shapes_float32", SVD,
        "    order[place] = j;\n  }\n  sync_block();", "    order[place] = j;\n  }"),
    EmulatedBug("maximum read before all warps have written", "thread", "svd_shapes_float32", SVD,
        "slots[thread_index() / kWarp] = value;\n  sync_block();", "slots[thread_index() / kWarp] = value;"),
    EmulatedBug("one pair of every tournament left out", "plain", "svd_shapes_float64", SVD,
        "for (int pair = warp; pair < players / 2; pair += kWarps)",
        "for (int pair = warp; pair < players / 2 - 1; pair += kWarps)"),
    EmulatedBug("the last sum of a warp left out", "plain", "svd_shapes_float32", SVD,
        "for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle",
        "for (int mask = kWarp / 2; mask > 1; mask /= 2) value += shuffle"),
    EmulatedBug("rotations not gathered in V", "plain", "svd_shapes_float64", SVD,
        "i < rows + turned; i += kWarp", "i < rows + turned - 1; i += kWarp"),
    EmulatedBug("singular values not scaled back", "plain", "svd_spectra", SVD,
        "converged ? scale_by(value[order[j]], exponent)", "converged ? value[order[j]]"),
    EmulatedBug("floor of the polar factor ignored", "plain", "polar_leaves_out_what_is_below_the_floor", SVD,
        "if (!(value[order[j]] <= least))", "if (!(value[order[j]] <= 0))"),
    EmulatedBug("left and right vectors of a wide matrix swapped", "plain", "svd_shapes_float64", SVD,
        "(left == layout.transposed ? rows : 0) + i", "(left ? 0 : rows) + i"),
    EmulatedBug("vectors turned where only values are wanted", "address", "values_alone", SVD,
        "  if (vh)\n", "  if (!u || vh)\n"),
    EmulatedBug("null vectors left as they were", "plain", "vectors_of_what_is_rank_deficient", SVD,
        "while (rank > 0 && s[rank - 1] == 0) --rank;", ""),
    EmulatedBug("null vectors begin with any unit vector", "plain", "vectors_of_what_is_rank_deficient", SVD,
        "at(i, rank) < at(least, rank) ? i : least;", "at(i, rank) < at(least, rank) ? least : i;"),
    EmulatedBug("last projection of a null vector left out", "plain", "vectors_of_what_is_rank_deficient", SVD,
        "for (int j = warp; j < rank; j += kWarps)", "for (int j = warp; j < rank - 1; j += kWarps)"),
    EmulatedBug("no barrier before a null vector is projected", "thread", "vectors_of_what_is_rank_deficient", SVD,
        "      at(i, rank) = rest;\n    }\n    sync_block();\n    for (int j = warp; j < rank;",
        "      at(i, rank) = rest;\n    }\n    for (int j = warp; j < rank;"),
    EmulatedBug("null vector overwritten while others read it", "thread", "vectors_of_what_is_rank_deficient", SVD,
        "at(i, rank) < at(least, rank) ? i : least;\n    sync_block();", "at(i, rank) < at(least, rank) ? i : least;"),
    EmulatedBug("rows of an odd matrix overlap", "plain", "svd_shapes_float32", SVD,
        "stride((rows + columns) | 1)", "stride((rows + columns - 1) | 1)"),

    # --- primitives and their twins --------------------------------------------------------------------------------
    EmulatedBug("kernel without sync_block", "thread", "shared_memory_and_sync_block", KERNELS,
        "  values[n - 1 - i] = block_index() * n + i;\n  sync_block();",
        "  values[n - 1 - i] = block_index() * n + i;"),
    EmulatedBug("kernel without sync_warp", "thread", "sync_warp_orders_memory", KERNELS,
        "    values[thread_index()] = in[thread_index()] + round;\n    sync_warp();",
        "    values[thread_index()] = in[thread_index()] + round;"),
    EmulatedBug("kernel with a lax copy wait", "plain", "copies", KERNELS,
        "copy_wait<kCopyStages - 2>()", "copy_wait<kCopyStages - 1>()"),
    EmulatedBug("kernel without the barrier after a copy", "thread", "copies", KERNELS,
        "    sync_block();\n    start(stage", "    start(stage"),
    EmulatedBug("kernel with swapped halves of a", "plain", "mma_bfloat16", KERNELS,
        "const T* at = a + (g + i % 2 * 8) * 16 + t + i / 2 * 8;",
        "const T* at = a + (g + i / 2 * 8) * 16 + t + i % 2 * 8;"),
    EmulatedBug("shuffle of the lane's own value", "plain", "shuffles", TWIN_PRIMITIVES,
        "(fiber->thread % kWarp) ^ mask", "(fiber->thread % kWarp) ^ (mask & 0)"),
    EmulatedBug("matrices not transposed", "plain", "matrices_are_transposed", TWIN_PRIMITIVES,
        "slots[8 * matrix + first + i].word[column / 2] >> 16 * (column % 2)",
        "slots[8 * matrix + column].word[(first + i) / 2] >> 16 * ((first + i) % 2)"),
    EmulatedBug("rows of a swapped in mma", "plain", "mma_float16", TWIN_PRIMITIVES,
        "upper = i / 2, column = 2 * (lane % 4) + i % 2", "upper = 1 - i / 2, column = 2 * (lane % 4) + i % 2"),
    EmulatedBug("copies arrive at once", "plain", "an_early_read_is_nan", TWIN,
        "  store_vector(to, {{~0u, ~0u, ~0u, ~0u}});  // NaN in every type until the wait",
        "  store_vector(to, load_vector(from));"),
    EmulatedBug("exponents one too high", "plain", "arithmetic", TWIN,
        "inline int exponent_of(double x) { return std::ilogb(x); }",
        "inline int exponent_of(double x) { return std::ilogb(x) + 1; }"),
    EmulatedBug("subnormal float16 taken for zero", "plain", "conversions", TWIN,
        "std::ldexp(static_cast<float>(fraction), -24)", "0.f"),
    EmulatedBug("products rounded before they are added", "plain", "arithmetic", TWIN,
        "inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }",
        "inline float multiply_add(float a, float b, float c) { volatile float p = a * b; return p + c; }"),
]
