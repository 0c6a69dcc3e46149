"""theseus_ext.cross_moment_ and cross_moments_: values against float64, bounds tied to torch, strides, mixings."""

import sys
from pathlib import Path

import pytest
import torch

import theseus_ext

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import baseline  # noqa: E402

NAMES = ("cross", "source_sum", "target_sum", "source_energy", "target_energy")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def masters(source, target, *, heads=None) -> dict[str, torch.Tensor]:
    d_source, d_target = source.shape[1], target.shape[1]
    cross = (d_source, d_target) if heads is None else (heads, d_source // heads, d_target // heads)
    shapes = (cross, (d_source,), (d_target,), (d_source,), (d_target,))
    wide = dict(dtype=torch.float64, device=source.device)
    return {name: torch.zeros(shape, **wide) for name, shape in zip(NAMES, shapes, strict=True)}


def moments(function, source, target, *, heads=None, **mixings) -> dict[str, torch.Tensor]:
    outputs = masters(source, target, heads=heads)
    assert function(source, target, **outputs, **mixings) is None
    return outputs


def error(result, exact) -> float:
    return ((result - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def bound(name, source, target, torchs) -> float:
    """Twice torch's error over a floor: rounding to float64, or of products in parts on tensor cores one to float32."""
    in_parts = name == "cross" and source.is_cuda and torch.float64 not in (source.dtype, target.dtype)
    return 2 * torchs + (2**-23 if in_parts else 1e-14)


def check(source, target, **mixings) -> None:
    ours, torchs, exact = (
        moments(function, source, target, **mixings)
        for function in (theseus_ext.cross_moment_, baseline.cross_moment_, theseus_ext.reference.cross_moment_)
    )
    for name in NAMES:
        limit = bound(name, source, target, error(torchs[name], exact[name]))
        assert error(ours[name], exact[name]) <= limit, name


def randn(*shape, dtype=torch.float32, device="cpu"):
    return (torch.randn(*shape, device=device, dtype=torch.float64) + 0.3).to(dtype)


def csr(rows, tokens, device, *, per_row=3, weighted=True):
    """Rows with 0 to `per_row` entries, so empty rows occur."""
    count = torch.randint(0, per_row + 1, (rows,))
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), count.cumsum(0)])
    column = torch.randint(0, tokens, (int(row_ptr[-1]),))
    weight = torch.rand(len(column), dtype=torch.float64) if weighted else None
    return tuple(None if part is None else part.to(device) for part in (row_ptr, column, weight))


def selection(rows, tokens, device):
    return None, torch.randperm(tokens)[:rows].to(device), None


def test_empty_selection_adds_nothing(device) -> None:
    """An empty column has a null pointer; it is a mixing of no rows all the same."""
    integers, wide = dict(dtype=torch.int64, device=device), dict(dtype=torch.float64, device=device)
    nothing = (None, torch.zeros(0, **integers), None)
    tokens = torch.ones(2, 3, device=device)
    outputs = masters(tokens, tokens)
    theseus_ext.cross_moment_(tokens, tokens, **outputs, source_mixing=nothing, target_mixing=nothing)
    assert not any(value.any() for value in outputs.values())
    empty_rows = (torch.zeros(3, **integers), nothing[1], torch.zeros(0, **wide))
    theseus_ext.cross_moment_(tokens, tokens, **outputs, source_mixing=empty_rows)
    assert not outputs["cross"].any() and not outputs["source_energy"].any()
    assert torch.equal(outputs["target_sum"], torch.full((3,), 2.0, **wide))


@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
def test_dtypes(device, source_dtype, target_dtype):
    check(randn(777, 37, dtype=source_dtype, device=device), randn(777, 70, dtype=target_dtype, device=device))


@pytest.mark.parametrize("rows", [1, 7, 1024, 4097, 9000])
@pytest.mark.parametrize("widths", [(1, 1), (128, 256), (257, 65)], ids=str)
def test_rows_and_widths(device, rows, widths):
    check(randn(rows, widths[0], device=device), randn(rows, widths[1], device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["selection", "weighted selection", "weighted", "unweighted"])
@pytest.mark.parametrize("side", ["source", "target", "both"])
def test_mixings(device, dtype, kind, side):
    rows, tokens = 300, 500

    def mixing():
        if kind == "selection":
            return selection(rows, tokens, device)
        if kind == "weighted selection":
            return *selection(rows, tokens, device)[:2], torch.rand(rows, dtype=torch.float64, device=device)
        return csr(rows, tokens, device, weighted=kind == "weighted")

    sides = ("source", "target") if side == "both" else (side,)
    tensors = [randn(tokens if s in sides else rows, 40, dtype=dtype, device=device) for s in ("source", "target")]
    check(*tensors, **{f"{s}_mixing": mixing() for s in sides})


@pytest.mark.parametrize("rows", [300, 4100])
@pytest.mark.parametrize("side", ["source", "target", "both"])
def test_mixings_of_wide_spaces(device, rows, side):
    """On a GPU rows that many tiles of the other side read are mixed once, 4096 at a time (csrc/dispatch.h)."""
    sides = ("source", "target") if side == "both" else (side,)
    lengths = {s: 500 if s in sides else rows for s in ("source", "target")}
    tensors = [
        randn(lengths["source"], 330, device=device),
        randn(lengths["target"], 290, dtype=torch.bfloat16, device=device),
    ]
    check(*tensors, **{f"{s}_mixing": csr(rows, 500, device) for s in sides})


@pytest.mark.parametrize("rows", [200, 4097])
def test_large_plain_products(gpu, rows):
    """Those the library multiplies (csrc/dispatch.h), and a row more than it takes."""
    x, y = (randn(rows, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ours = moments(theseus_ext.cross_moment_, x, y)
    exact = x[:, :64].double().T @ y.double()
    assert error(ours["cross"][:64], exact) <= rows * 2**-23  # as many additions in float32, each cut or rounded
    torch.testing.assert_close(ours["source_sum"], x.double().sum(0), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(ours["target_energy"], y.double().square().sum(0), rtol=1e-12, atol=1e-9)


def test_every_argument_counts(device):
    """Small integers: every value is exact, so equality tells whether each argument reached its place."""
    source = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device)
    target = torch.tensor([[7.0], [8.0]], dtype=torch.float64, device=device)
    integers = dict(dtype=torch.int64, device=device)
    outputs = {name: tensor + 100 for name, tensor in masters(source, target).items()}
    theseus_ext.cross_moment_(
        source,
        target,
        **outputs,
        source_mixing=(
            torch.tensor([0, 2, 3], **integers),
            torch.tensor([0, 2, 1], **integers),
            torch.tensor([0.5, 2, 4], dtype=torch.float64, device=device),
        ),
        target_mixing=(None, torch.tensor([1, 0], **integers), torch.tensor([3, 0.5], device=device).double()),
    )
    x, y = torch.tensor([[10.5, 13.0], [12.0, 16.0]]).double(), torch.tensor([[24.0], [3.5]]).double()
    expected = dict(zip(NAMES, (x.T @ y, x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0)), strict=True))
    for name in NAMES:
        assert torch.equal(outputs[name].cpu(), expected[name] + 100), name


def test_a_mask_selects_and_masked_rows_cannot_leak(device):
    source, target = randn(50, 6, device=device), randn(50, 5, device=device)
    kept = torch.arange(50, device=device) % 3 != 0
    expected = moments(theseus_ext.cross_moment_, source[kept], target[kept])
    source[~kept], target[~kept] = float("nan"), float("inf")
    mixing = (None, kept.nonzero()[:, 0], None)
    masked = moments(theseus_ext.cross_moment_, source, target, source_mixing=mixing, target_mixing=mixing)
    assert all(torch.equal(masked[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_value_converts_exactly(device, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, -1).to(device)
    one = torch.ones(1, 1, device=device)
    outputs = moments(theseus_ext.cross_moment_, values, one)
    assert torch.equal(outputs["source_sum"].nan_to_num(0), values[0].double().nan_to_num(0))
    assert torch.equal(outputs["source_sum"].isnan(), values[0].isnan())


def test_nan_and_inf_pass_through(device):
    source, target = torch.ones(4, 3, device=device), torch.ones(4, 2, device=device)
    source[2, 1], target[0, 1] = float("nan"), float("inf")
    outputs = moments(theseus_ext.cross_moment_, source, target)
    assert outputs["cross"].isfinite().tolist() == [[True, False], [False, False], [True, False]]
    assert outputs["cross"][1].isnan().all() and outputs["cross"][0, 0] == 4
    if device == "cpu":  # on tensor cores an Inf of float32 is split into parts, of which one is NaN
        assert outputs["cross"][::2, 1].isinf().all()
    assert outputs["source_sum"].isnan().tolist() == [False, True, False]
    assert outputs["target_energy"].isinf().tolist() == [False, True]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every other column", "expanded", "offset"])
def test_strides(device, layout):
    tokens = {
        "transposed": lambda: randn(20, 90, device=device).T,
        "sliced": lambda: randn(90, 64, device=device)[:, 5:25],
        "every other column": lambda: randn(90, 40, device=device)[:, ::2],
        "expanded": lambda: randn(1, 20, device=device).expand(90, 20),
        "offset": lambda: randn(91 * 20 + 1, device=device)[1:1801].view(90, 20),
    }[layout]()
    target = randn(90, 11, device=device)
    ours, dense = (moments(theseus_ext.cross_moment_, x, target) for x in (tokens, tokens.clone().contiguous()))
    assert all(torch.equal(ours[name], dense[name]) for name in NAMES)


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)], ids=str)
def test_empty(device, shape):
    rows, width_source, width_target = shape
    source, target = randn(rows, width_source, device=device), randn(rows, width_target, device=device)
    ours, exact = (moments(f, source, target) for f in (theseus_ext.cross_moment_, theseus_ext.reference.cross_moment_))
    assert all(torch.allclose(ours[name], exact[name], rtol=1e-12) for name in NAMES)


def test_splits_equal_the_whole(device):
    source, target = randn(3001, 33, device=device), randn(3001, 20, device=device)
    whole, parts = moments(theseus_ext.cross_moment_, source, target), masters(source, target)
    for x, y in zip(source.split(700), target.split(700), strict=True):
        theseus_ext.cross_moment_(x, y, **parts)
    exact = moments(theseus_ext.reference.cross_moment_, source, target)
    for name in NAMES:
        torchs = moments(baseline.cross_moment_, source, target)[name]
        assert error(parts[name], whole[name]) <= 4 * error(torchs, exact[name]) + 1e-14, name


def test_same_inputs_same_bytes(device):
    source, target = randn(5000, 300, device=device), randn(5000, 200, dtype=torch.bfloat16, device=device)
    mixing = csr(5000, 5000, device)
    first, *others = (moments(theseus_ext.cross_moment_, source, target, source_mixing=mixing) for _ in range(3))
    assert all(torch.equal(first[name], other[name]) for other in others for name in NAMES)


def test_sums_do_not_depend_on_the_thread_count():
    source, target = randn(3000, 600), randn(3000, 300)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, before):
        torch.set_num_threads(threads)
        results.append(moments(theseus_ext.cross_moment_, source, target))
    assert all(torch.equal(results[0][name], other[name]) for other in results for name in NAMES[1:])


def test_accuracy_holds_over_many_tokens(device):
    """One sign, so rounding of a long float32 accumulation would show; the flush into float64 bounds it."""
    source, target = torch.rand(60_000, 8, device=device), torch.rand(60_000, 8, device=device)
    check(source, target)
    exact = moments(theseus_ext.reference.cross_moment_, source, target)["cross"]
    running = torch.zeros(8, 8, device=device)
    for x, y in zip(source.split(64), target.split(64), strict=True):
        running += x.T @ y
    assert error(moments(theseus_ext.cross_moment_, source, target)["cross"], exact) <= error(running, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(12, 12), (15, 9), (3, 0)], ids=str)
def test_heads(device, dtype, widths):
    """Head by head: the blocks on the diagonal of the whole cross-moment, here of three heads."""
    source, target = (randn(50, width, dtype=dtype, device=device) for width in widths)
    check(source, target, heads=3)
    mixings = dict(source_mixing=csr(40, 50, device), target_mixing=selection(40, 50, device))
    check(source, target, heads=3, **mixings)
    whole = moments(theseus_ext.reference.cross_moment_, source, target)["cross"].unflatten(0, (3, -1))
    blocks = moments(theseus_ext.reference.cross_moment_, source, target, heads=3)["cross"]
    for head in range(3):
        assert torch.allclose(blocks[head], whole[head].unflatten(1, (3, widths[1] // 3))[:, head], rtol=1e-12)


def test_spaces_in_one_call(device):
    """Spaces of every dtype and width, one of heads, more than a launch holds: each what it is alone."""
    kinds = [(DTYPES[i % 4], DTYPES[i % 3], 8 * (i % 5) + 1, 3 * i + 2) for i in range(19)]
    source = [randn(90, ws, dtype=s, device=device) for s, _, ws, _ in kinds] + [randn(90, 6, device=device)]
    target = [randn(70, wt, dtype=t, device=device) for _, t, _, wt in kinds] + [randn(70, 10, device=device)]
    heads = [None] * 19 + [2]
    mixings = dict(source_mixing=csr(60, 90, device), target_mixing=selection(60, 70, device))
    spaces = [masters(x, y, heads=h) for x, y, h in zip(source, target, heads, strict=True)]
    lists = {name: [space[name] for space in spaces] for name in NAMES}
    assert theseus_ext.cross_moments_(source, target, **lists, **mixings) is None
    exact = {name: [torch.zeros_like(x) for x in lists[name]] for name in NAMES}
    theseus_ext.reference.cross_moments_(source, target, **exact, **mixings)
    for i, (x, y, h) in enumerate(zip(source, target, heads, strict=True)):
        alone = moments(theseus_ext.cross_moment_, x, y, heads=h, **mixings)
        torchs = moments(baseline.cross_moment_, x, y, heads=h, **mixings)
        for name in NAMES:
            limit = bound(name, x, y, error(torchs[name], exact[name][i]))
            assert error(lists[name][i], exact[name][i]) <= limit, (i, name)
            assert device == "cuda" or torch.equal(lists[name][i], alone[name]), (i, name)
    theseus_ext.cross_moments_([], [], **{name: [] for name in NAMES})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs: launches elsewhere were not tried")
def test_launches_on_the_tensors_device():
    source, target = randn(500, 33, device="cuda:1"), randn(500, 20, device="cuda:1")
    with torch.cuda.device(0):
        check(source, target)
        assert torch.cuda.current_device() == 0


def test_launches_in_the_current_stream(gpu):
    """Work queued before and after in one stream is in order; nothing waits for it."""
    source, target = randn(4096, 256, device="cuda"), randn(4096, 256, device="cuda")
    expected = moments(theseus_ext.cross_moment_, source * 3, target)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # cycles: far longer than the host takes to queue the rest
        found = moments(theseus_ext.cross_moment_, source * 3, target)
        cross = found["cross"].clone()
        torch.cuda.current_stream().synchronize()
    assert torch.equal(cross, expected["cross"])
