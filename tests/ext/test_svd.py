"""theseus_ext.svd, svdvals, polar: bytes on the CPU, bounds on a GPU, contracts."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import theseus_ext
from theseus_ext.ops import _shared_out

QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # a device is the same for all
DTYPES = (torch.float64, torch.float32)
SHAPES = [(3, 3), (1, 1, 1), (7, 33, 17), (7, 17, 33), (2, 3, 5, 4), (5, 128, 128), (9, 1, 6)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (2, 0, 3, 3), (0, 0)]
FLOOR = 1e-4
OPS = (torch.ops.theseus_ext.svd.default, torch.ops.theseus_ext.svdvals.default)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def everything(matrices: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*theseus_ext.svd(matrices), theseus_ext.svdvals(matrices), *theseus_ext.polar(matrices, FLOOR))


def elsewhere(matrices: torch.Tensor, skipped: int) -> torch.Tensor:
    """The same values, which start so many numbers behind where torch aligns memory."""
    place = torch.empty(skipped + matrices.numel(), dtype=matrices.dtype)
    return place[skipped:].view(matrices.shape).copy_(matrices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_one_thread_a_matrix_has_torchs_bytes_whatever_the_batch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """In a batch most matrices start unaligned, and the last bits of some of MKL's paths depend on where."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrices = draw(*shape, dtype=dtype)
        wholes = [x.flatten(0, len(shape) - 3) if len(shape) > 2 else x[None] for x in everything(matrices)]
        for i, matrix in enumerate(matrices.reshape(-1, *shape[-2:])):
            mine = [whole[i] for whole in wholes]
            alone = (*torch.linalg.svd(matrix, full_matrices=False), torch.linalg.svdvals(matrix))
            alone += theseus_ext.polar(matrix, FLOOR)
            assert [x.dtype for x in mine] == [dtype] * 6 and all(map(torch.equal, mine, alone)), i
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 300, 200)], ids=str)
def test_the_same_inputs_on_as_many_threads_give_the_same_bytes(
    threads: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Wherever they lie. Other counts may not: LAPACK takes other paths for 300 x 200; values to its test ratio."""
    matrices = draw(*shape, dtype=dtype)
    found = everything(matrices)
    assert all(x.is_contiguous() for x in found)
    for skipped in (0, 1, 3):
        assert all(map(torch.equal, everything(elsewhere(matrices, skipped)), found)), skipped
    bound = 30 * torch.finfo(dtype).eps * max(shape) * float(found[1].max())
    torch.testing.assert_close(found[1], torch.linalg.svdvals(matrices), rtol=0, atol=bound)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_of_nothing_as_torch(threads: int, shape: tuple[int, ...]) -> None:
    matrices = draw(*shape)
    found = (*theseus_ext.svd(matrices), theseus_ext.svdvals(matrices))
    expected = (*torch.linalg.svd(matrices, full_matrices=False), torch.linalg.svdvals(matrices))
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


@QUICK
@given(st.integers(0, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.integers(0, 10**6))
def test_restores_what_it_took_apart(device: str, batch: int, m: int, n: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(batch, d, rank, dtype=torch.float64, generator=generator) for d in (m, n)]
    matrices = (sides[0] @ sides[1].mT).to(device)
    u, s, vh = theseus_ext.svd(matrices)
    k, unit = min(m, n), torch.finfo(torch.float64).eps * max(m, n)  # LAPACK's tests allow 30 of these
    scale = 30 * unit * torch.linalg.matrix_norm(matrices).clamp(min=1)
    eye = torch.eye(k, dtype=torch.float64, device=device)
    assert bool((torch.linalg.matrix_norm(u * s[:, None] @ vh - matrices) <= scale).all())
    assert bool((torch.linalg.matrix_norm(u.mT @ u - eye) <= 30 * unit).all())
    assert bool((torch.linalg.matrix_norm(vh @ vh.mT - eye) <= 30 * unit).all())
    assert bool((s.diff(dim=-1) <= 0).all() and (s >= 0).all())
    torch.testing.assert_close(theseus_ext.svdvals(matrices), s, rtol=0, atol=float(scale.max()) if batch else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 128, 100)], ids=str)
def test_polar_is_the_factor_above_the_floor(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Values on either side of the floor, and a zero matrix; the bound is that of any polar factor, over its gap."""
    *batch, m, n = shape
    k, share = min(m, n), 10 * FLOOR
    u, v = (torch.linalg.qr(draw(*batch, d, k))[0] for d in (m, n))
    values = torch.linspace(1, 2 * share, k).double() * (torch.arange(k) % 3 != 2)
    values = torch.where(torch.arange(k) % 3 == 1, values * FLOOR / 2, values)
    values[0] = 1
    matrices = ((u * values) @ v.mT).to(device, dtype)
    if len(shape) > 3:
        matrices[0] = 0
    found, s = theseus_ext.polar(matrices, FLOOR)
    unit = torch.finfo(dtype).eps * max(m, n)  # LAPACK's tests allow 30 of these
    torch.testing.assert_close(s, theseus_ext.svdvals(matrices), rtol=0, atol=30 * unit)
    kept = values > FLOOR
    expected = (u * kept) @ v.mT * (matrices != 0).any(-1, keepdim=True).any(-2, keepdim=True).cpu()
    bound = 60 * unit / float(values[kept].min())
    assert float(torch.linalg.matrix_norm(found.double().cpu() - expected).max()) <= bound
    size = torch.linalg.matrix_norm(found @ found.mT @ found - found)
    assert float(size.max()) <= 30 * unit * k**0.5 and found.dtype == s.dtype == dtype


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_polar_of_what_is_not_finite(value: float, device: str) -> None:
    """The CPU says so; a device, which is not waited for, gives NaN for that matrix and no other."""
    matrices = draw(3, 5, 4)
    matrices[1, 2, 3] = value
    if device == "cpu":
        with pytest.raises(torch.linalg.LinAlgError, match=r"^svd of \[3, 5, 4\]: matrix 1 of 3 holds NaN or Inf$"):
            theseus_ext.polar(matrices, FLOOR)
        return
    found, s = theseus_ext.polar(matrices.to(device), FLOOR)
    assert s.isnan().all(-1).tolist() == found.isnan().flatten(1).any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(3, 5, 4), (0, 5, 4), (2, 0, 3)], ids=str)
def test_polar_as_an_op(shape: tuple[int, ...], device: str) -> None:
    op = torch.ops.theseus_ext.polar.default
    torch.library.opcheck(op, (draw(*shape).to(device), FLOOR))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (draw(*shape).to(device).requires_grad_(), FLOOR), test_utils=tests)
    assert not any(x.requires_grad for x in theseus_ext.polar(draw(*shape).requires_grad_(), FLOOR))
    real, meta = (theseus_ext.polar(x, FLOOR) for x in (draw(*shape), draw(*shape).to("meta")))
    assert [x.shape for x in real] == [x.shape for x in meta]
    whole = torch.compile(lambda x: op(x * 2, FLOOR)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(whole(draw(*shape)), theseus_ext.polar(draw(*shape) * 2, FLOOR)[0])


def test_strides_are_free_and_inputs_stay_as_they_were(device: str) -> None:
    whole = draw(4, 12, 10).to(device)
    views = (whole.mT, whole[:, ::2, 1::3], whole[::2], whole[:1].expand(3, 12, 10), whole.transpose(0, 1))
    for view in views:
        before = view.clone()
        found, expected = theseus_ext.svd(view), theseus_ext.svd(before)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and torch.equal(view, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("op", [theseus_ext.svd, theseus_ext.svdvals])
def test_what_is_not_finite_is_named(op, value: float, device: str) -> None:
    matrices = draw(2, 3, 5, 4).to(device)
    matrices[1, 0, 2, 3] = value
    with pytest.raises(torch.linalg.LinAlgError, match=r"^svd of \[2, 3, 5, 4\]: matrix 3 of 6 holds NaN or Inf$"):
        op(matrices)


@pytest.mark.parametrize("op", [theseus_ext.svd, theseus_ext.svdvals])
def test_out_of_memory_is_said_as_such(op) -> None:
    with pytest.raises(RuntimeError, match="allocate memory") as error:
        op(draw(1, 1, 1).expand(2**57, 1, 1))  # 1 EiB, beyond 57-bit addresses
    assert not isinstance(error.value, torch.linalg.LinAlgError)


def test_no_memory_within_the_op_is_said_as_such() -> None:
    """As the stable ABI words it when the address space is limited to less than the results take."""

    def full(matrices: torch.Tensor) -> None:
        raise RuntimeError('torch_call_dispatcher( "aten::empty", stack.data()) API call failed at ops.h, line 631')

    with pytest.raises(MemoryError, match=r"svd of \[3, 3\]: no memory for its results"):
        _shared_out(full, draw(3, 3))


@pytest.mark.parametrize("op", [theseus_ext.svd, theseus_ext.svdvals])
def test_refuses_what_does_not_fit(op) -> None:
    with pytest.raises(ValueError, match=r"matrices is \[5\], expected \[..., m, n\]"):
        op(draw(5))
    for dtype in (torch.bfloat16, torch.int64, torch.complex128):
        with pytest.raises(TypeError, match=f"matrices is {dtype}, expected float64 or float32"):
            op(torch.ones(3, 3, dtype=dtype))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_op_itself_refuses_what_its_wrapper_never_sends(op) -> None:
    with pytest.raises(RuntimeError, match=r"svd: matrices must be contiguous \[batch, m, n\]"):
        op(draw(3, 3))
    with pytest.raises(RuntimeError, match="svd: matrices must be contiguous"):
        op(draw(2, 4, 3).mT)
    with pytest.raises(RuntimeError, match="svd: matrices must be float32 or float64"):
        op(draw(2, 3, 3).bfloat16())


@pytest.mark.parametrize("shape", [(3, 5, 4), (0, 5, 4), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_opcheck(op, shape: tuple[int, ...], device: str) -> None:
    torch.library.opcheck(op, (draw(*shape).to(device),))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (draw(*shape).to(device).requires_grad_(),), test_utils=tests)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY, (2, 128, 100), (2, 129, 4)], ids=str)
def test_on_cuda_as_on_the_cpu(gpu, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Values to LAPACK's test ratio; 129 rows are torch's own. A batch gives the bytes of its matrices."""
    matrices = draw(*shape, dtype=dtype)
    found, expected = theseus_ext.svd(matrices.cuda()), theseus_ext.svd(matrices)
    bound = 30 * torch.finfo(dtype).eps * max(shape[-2:]) * float(expected[1].max()) if matrices.numel() else 0
    for own, other in zip(found, expected, strict=True):
        assert own.is_cuda and own.shape == other.shape and own.dtype == dtype
    values = theseus_ext.svdvals(matrices.cuda())
    for own in (found[1], values):
        torch.testing.assert_close(own.cpu(), expected[1], rtol=0, atol=bound)
    if len(shape) == 3 and shape[0] > 1 and max(shape) <= 128:
        alone = theseus_ext.svd(matrices[1].cuda())
        assert all(torch.equal(a[1], b) for a, b in zip(found, alone, strict=True))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_the_kernel_refuses_what_is_larger(gpu, op) -> None:
    with pytest.raises(
        RuntimeError, match="svd: matrices on a GPU have at most 128 rows and columns, these are 129 x 4"
    ):
        op(draw(2, 129, 4).cuda())


def test_no_gradient_flows() -> None:
    for tensor in (*theseus_ext.svd(draw(2, 3, 3).requires_grad_()), theseus_ext.svdvals(draw(3, 3).requires_grad_())):
        assert not tensor.requires_grad


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (4, 6), (0, 2, 2)], ids=str)
def test_meta_and_compiled_have_the_shapes_of_the_real_thing(shape: tuple[int, ...]) -> None:
    real = (*theseus_ext.svd(draw(*shape)), theseus_ext.svdvals(draw(*shape)))
    meta = draw(*shape).to("meta")
    for own, expected in zip((*theseus_ext.svd(meta), theseus_ext.svdvals(meta)), real, strict=True):
        assert own.is_meta and own.shape == expected.shape and own.dtype == expected.dtype


def test_compiles_whole(device: str) -> None:
    def nuclear(matrices: torch.Tensor) -> torch.Tensor:
        u, s, vh = torch.ops.theseus_ext.svd(matrices * 2)
        return (u * s[:, None] @ vh).sum() + torch.ops.theseus_ext.svdvals(matrices).sum()

    matrices = draw(3, 6, 5).to(device)
    assert torch.equal(torch.compile(nuclear, fullgraph=True, backend="aot_eager")(matrices), nuclear(matrices))
