"""theseus_ext.cross_moment_ as a torch op: opcheck, meta, compile, versions, gradients and the text of every error."""

import re

import pytest
import torch

import theseus_ext

INDEX = torch.tensor([0, 1, 1], dtype=torch.int64)


def arguments(*, device="cpu", dtype=torch.float32, rows=3, widths=(4, 2)):
    source, target = torch.ones(rows, widths[0], dtype=dtype), torch.ones(rows, widths[1], dtype=dtype)
    wide = dict(dtype=torch.float64)
    outputs = dict(
        cross=torch.zeros(widths, **wide),
        source_sum=torch.zeros(widths[0], **wide),
        target_sum=torch.zeros(widths[1], **wide),
        source_energy=torch.zeros(widths[0], **wide),
        target_energy=torch.zeros(widths[1], **wide),
    )
    return [x.to(device) for x in (source, target)], {name: x.to(device) for name, x in outputs.items()}


@pytest.mark.parametrize(
    "mixing", [(None, None, None), (None, INDEX, None), (torch.tensor([0, 1, 1, 3]), INDEX, INDEX.double())]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(mixing, dtype):
    tokens, outputs = arguments(dtype=dtype)
    torch.library.opcheck(torch.ops.theseus_ext.cross_moment_.default, (*tokens, *mixing, *mixing), outputs)


def test_opcheck_with_gradients_asked_for():
    tokens, outputs = arguments()
    tokens[0].requires_grad_()
    nothing = (None,) * 6
    torch.library.opcheck(
        torch.ops.theseus_ext.cross_moment_.default,
        (*tokens, *nothing),
        outputs,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_whole():
    def step(source, target, column, **outputs):
        theseus_ext.cross_moment_(source * 2, target, **outputs, source_mixing=(None, column, None))
        return outputs["cross"] + 1

    tokens, eager = arguments()
    compiled = {name: x.clone() for name, x in eager.items()}
    expected = step(*tokens, INDEX, **eager)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*tokens, INDEX, **compiled)
    assert torch.equal(result, expected)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_runs_on_meta():
    tokens, outputs = arguments(device="meta")
    assert theseus_ext.cross_moment_(*tokens, **outputs) is None


def test_bumps_the_version_of_what_it_writes_and_lets_no_gradient_through():
    tokens, outputs = arguments()
    tokens[0].requires_grad_()
    before = {name: x._version for name, x in outputs.items()}
    theseus_ext.cross_moment_(*tokens, **outputs)
    assert all(x._version > before[name] and not x.requires_grad for name, x in outputs.items())
    assert tokens[0]._version == 0


WRONG_SHAPES = {
    "cross is [4, 3] but source has width 4 and target width 2": dict(cross=(4, 3)),
    "source_sum is [3] but source has width 4": dict(source_sum=(3,)),
    "target_sum is [1] but target has width 2": dict(target_sum=(1,)),
    "source_energy is [4, 1] but source has width 4": dict(source_energy=(4, 1)),
    "target_energy is [5] but target has width 2": dict(target_energy=(5,)),
    "source is [3, 4, 1], expected [tokens, width]; flatten leading dimensions": dict(source=(3, 4, 1)),
    "target is [3], expected [tokens, width]; flatten leading dimensions": dict(target=(3,)),
    "source has 5 rows but target has 3; mix one side to match the other": dict(source=(5, 4)),
}


@pytest.mark.parametrize(("message", "change"), WRONG_SHAPES.items())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_shapes_are_refused_by_wrapper_and_fake(message, change, device):
    tokens, outputs = arguments(device=device)
    named = dict(source=tokens[0], target=tokens[1], **outputs)
    for name, shape in change.items():
        named[name] = torch.ones(shape, dtype=named[name].dtype, device=device)
    with pytest.raises(ValueError, match=re.escape(message)):
        theseus_ext.cross_moment_(**named)
    if device == "meta":
        source, target = named.pop("source"), named.pop("target")
        with pytest.raises(ValueError, match=re.escape(message)):
            torch.ops.theseus_ext.cross_moment_(source, target, *(None,) * 6, **named)


def long(*values):
    return torch.tensor(values, dtype=torch.int64)


WRONG_MIXINGS = [
    ((None, None, None), ValueError, "source mixing has no column; pass None instead of the tuple"),
    ((None, long(0, 1, 2).int(), None), TypeError, "source column is torch.int32, expected torch.int64"),
    ((long(0, 1).float(), long(0), None), TypeError, "source row_ptr is torch.float32, expected torch.int64"),
    ((None, long(0), torch.ones(1)), TypeError, "source weight is torch.float32, expected torch.float64"),
    ((None, long(0)[None], None), ValueError, "source column is [1, 1], expected a vector"),
    ((None, long(0, 1), long(1).double()), ValueError, "source weight has 1 entries but column has 2"),
    ((long(), long(0), None), ValueError, "source row_ptr is empty, expected rows + 1 elements"),
    ((None, long(0, 1), None), ValueError, "source has 2 rows but target has 3"),
    ((None, long(0, 1, 2).to("meta"), None), ValueError, "source column is on meta but source is on cpu"),
    ((None, long(0, 3, 1), None), RuntimeError, "source column[1] is 3 but there are 3 tokens"),
    ((None, long(0, 1, -1), None), RuntimeError, "source column[2] is -1 but there are 3 tokens"),
    ((long(0, 1, 1, 1), long(0, 1), None), RuntimeError, "source row_ptr runs from 0 to 1, expected 0 to 2"),
    ((long(1, 1, 1, 2), long(0, 1), None), RuntimeError, "source row_ptr runs from 1 to 2, expected 0 to 2"),
    ((long(0, 2, 1, 2), long(0, 1), None), RuntimeError, "source row_ptr falls from 2 to 1 at row 1"),
]


@pytest.mark.parametrize(("mixing", "kind", "message"), WRONG_MIXINGS, ids=[m for *_, m in WRONG_MIXINGS])
@pytest.mark.parametrize("side", ["source", "target"])
def test_wrong_mixings_are_refused_and_write_nothing(mixing, kind, message, side):
    tokens, outputs = arguments()
    if side == "target":
        swap = {"source": "target", "target": "source"}
        message = re.sub("source|target", lambda name: swap[name[0]], message)
        message = re.sub("target has 2 rows but source has 3", "source has 3 rows but target has 2", message)
    with pytest.raises(kind, match=re.escape(message)):
        theseus_ext.cross_moment_(*tokens, **outputs, **{f"{side}_mixing": mixing})
    assert all(not x.any() for x in outputs.values())


def test_wrong_types_devices_and_masters_are_refused():
    (source, target), outputs = arguments()

    def refuse(kind, message, *, source=source, target=target, **change):
        with pytest.raises(kind, match=re.escape(message)):
            theseus_ext.cross_moment_(source, target, **(outputs | change))

    refuse(TypeError, "source is torch.int64, expected float64, float32, bfloat16 or float16", source=source.long())
    refuse(TypeError, "cross is torch.float32, expected torch.float64", cross=outputs["cross"].float())
    refuse(ValueError, "target is on meta but source is on cpu", target=target.to("meta"))
    refuse(ValueError, "target_sum is on meta but source is on cpu", target_sum=outputs["target_sum"].to("meta"))
    refuse(ValueError, "pass cross.detach()", cross=outputs["cross"].requires_grad_())
    refuse(ValueError, "cross has strides (1, 4)", cross=torch.zeros(2, 4, dtype=torch.float64).T)


def test_the_op_itself_checks_what_the_wrapper_would_have_fixed():
    (source, target), outputs = arguments()
    nothing = (None,) * 6
    with pytest.raises(RuntimeError, match="unit column stride"):
        torch.ops.theseus_ext.cross_moment_(source.T.contiguous().T, target, *nothing, **outputs)
    with pytest.raises(RuntimeError, match="cross must be contiguous float64 with 8 elements"):
        torch.ops.theseus_ext.cross_moment_(source, target, *nothing, **(outputs | dict(cross=torch.zeros(4, 2))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False")
def test_entries_out_of_range_become_nan_on_cuda():
    tokens, outputs = arguments(device="cuda")
    theseus_ext.cross_moment_(*tokens, **outputs, source_mixing=(None, long(0, 3, 1).cuda(), None))
    assert outputs["cross"].isnan().all() and outputs["target_sum"].isfinite().all()
