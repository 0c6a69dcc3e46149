"""cross_moment_ and cross_moments_ as torch ops: opcheck, meta, compile, versions, gradients, every error's text."""

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
def test_opcheck(mixing, dtype, device):
    tokens, outputs = arguments(dtype=dtype, device=device)
    mixing = [None if part is None else part.to(device) for part in mixing]
    torch.library.opcheck(torch.ops.theseus_ext.cross_moment_.default, (*tokens, *mixing, *mixing), outputs)
    lists = [[tokens[0], tokens[0].clone()], [tokens[1], tokens[1].clone()]]
    both = {name: [x, x.clone()] for name, x in outputs.items()}
    torch.library.opcheck(torch.ops.theseus_ext.cross_moments_.default, (*lists, *mixing, *mixing), both)


def test_opcheck_with_gradients_asked_for(device):
    tokens, outputs = arguments(device=device)
    tokens[0].requires_grad_()
    nothing = (None,) * 6
    torch.library.opcheck(
        torch.ops.theseus_ext.cross_moment_.default,
        (*tokens, *nothing),
        outputs,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def in_a_list(source, target, *, source_mixing, **outputs):
    lists = {name: [x] for name, x in outputs.items()}
    theseus_ext.cross_moments_([source], [target], source_mixing=source_mixing, **lists)


@pytest.mark.parametrize("function", [theseus_ext.cross_moment_, in_a_list])
def test_compiles_whole(function, device):
    def step(source, target, column, **outputs):
        function(source * 2, target, **outputs, source_mixing=(None, column, None))
        return outputs["cross"] + 1

    tokens, eager = arguments(device=device)
    index = INDEX.to(device)
    compiled = {name: x.clone() for name, x in eager.items()}
    expected = step(*tokens, index, **eager)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(*tokens, index, **compiled)
    assert torch.equal(result, expected)
    assert all(torch.equal(compiled[name], eager[name]) for name in eager)


def test_runs_on_meta():
    tokens, outputs = arguments(device="meta")
    assert theseus_ext.cross_moment_(*tokens, **outputs) is None
    lists = {name: [x, x.clone()] for name, x in outputs.items()}
    assert theseus_ext.cross_moments_([tokens[0]] * 2, [tokens[1]] * 2, **lists) is None


def test_bumps_the_version_of_what_it_writes_and_lets_no_gradient_through():
    tokens, outputs = arguments()
    tokens[0].requires_grad_()
    before = {name: x._version for name, x in outputs.items()}
    theseus_ext.cross_moment_(*tokens, **outputs)
    assert all(x._version > before[name] and not x.requires_grad for name, x in outputs.items())
    assert tokens[0]._version == 0
    before = {name: x._version for name, x in outputs.items()}
    theseus_ext.cross_moments_([tokens[0]], [tokens[1]], **{name: [x] for name, x in outputs.items()})
    assert all(x._version > before[name] and not x.requires_grad for name, x in outputs.items())


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


LISTS = {
    "cross[1] is [4, 3] but source[1] has width 4 and target[1] width 2": dict(cross=(4, 3)),
    "cross[1] is [3, 2, 1] but source[1] has width 4": dict(cross=(3, 2, 1)),
    "cross[1] is [0, 4, 2] but source[1] has width 4": dict(cross=(0, 4, 2)),
    "source_energy[1] is [4, 1] but source[1] has width 4": dict(source_energy=(4, 1)),
    "source[1] has 5 rows but target[1] has 3; mix one side to match the other": dict(source=(5, 4)),
    "source[1] is [3, 4, 1], expected [tokens, width]": dict(source=(3, 4, 1)),
}


@pytest.mark.parametrize(("message", "change"), LISTS.items())
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lists_name_the_space_that_does_not_fit(message, change, device):
    tokens, outputs = arguments(device=device)
    named = {name: [x, x.clone()] for name, x in dict(source=tokens[0], target=tokens[1], **outputs).items()}
    for name, shape in change.items():
        named[name][1] = torch.ones(shape, dtype=named[name][0].dtype, device=device)
    with pytest.raises(ValueError, match=re.escape(message)):
        theseus_ext.cross_moments_(**named)
    if device == "meta":
        source, target = named.pop("source"), named.pop("target")
        with pytest.raises(ValueError, match=re.escape(message)):
            torch.ops.theseus_ext.cross_moments_(source, target, *(None,) * 6, **named)


def test_lists_that_do_not_fit_each_other_are_refused():
    tokens, outputs = arguments()
    named = {name: [x, x.clone()] for name, x in dict(source=tokens[0], target=tokens[1], **outputs).items()}

    def refuse(kind, message, op=theseus_ext.cross_moments_, **change):
        with pytest.raises(kind, match=re.escape(message)):
            op(**(named | change))

    refuse(
        ValueError, "target_sum has 1 tensors but source has 2: one for every space", target_sum=named["target_sum"][:1]
    )
    refuse(ValueError, "source[1] is on meta but source[0] is on cpu", source=[tokens[0], tokens[0].to("meta")])
    refuse(ValueError, "pass cross[1].detach()", cross=[named["cross"][0], named["cross"][1].requires_grad_()])
    named["cross"][1].requires_grad_(False)
    refuse(
        RuntimeError, "cross_moments_: two masters share memory; give every space its own", cross=named["cross"][:1] * 2
    )
    raw = dict.fromkeys(f"{s}_{p}" for s in ("source", "target") for p in ("row_ptr", "column", "weight"))
    named |= raw
    op = torch.ops.theseus_ext.cross_moments_
    refuse(RuntimeError, "1 tensors in one list and 2 in another", op, target=named["target"][:1])
    refuse(RuntimeError, "3 heads do not divide the widths 4 and 2", op, cross=[torch.zeros(3, 1, 1).double()] * 2)
    assert all(not x.any() for name in outputs for x in named[name])


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_entries_out_of_range_become_nan_on_cuda(gpu, dtype):
    tokens, outputs = arguments(device="cuda", dtype=dtype)
    theseus_ext.cross_moment_(*tokens, **outputs, source_mixing=(None, long(0, 3, 1).cuda(), None))
    assert outputs["cross"].isnan().all() and outputs["target_sum"].isfinite().all()
