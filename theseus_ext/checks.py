"""What cross-moments ask of their tensors: messages carry values and the cure. Shapes only, so fakes use them too."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

#: A sparse row mixing P in CSR: (row_ptr int64 [rows + 1] or None, column int64 [entries], weight float64 [entries] or
#: None). Without row_ptr every row has exactly one entry (a selection); without weight all weights are 1.
Mixing: TypeAlias = tuple[Tensor | None, Tensor, Tensor | None]

TOKEN_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASTERS = ("cross", "source_sum", "target_sum", "source_energy", "target_energy")
CROSSES = {"gram": "input", "source_cross": "source", "target_cross": "target"}  # of inputs with what
EFFECT_MASTERS = (*CROSSES, *(f"{of}_{what}" for what in ("sum", "energy") for of in CROSSES.values()))


def check_space(
    source: Tensor,
    target: Tensor,
    source_mixing: Mixing | None,
    target_mixing: Mixing | None,
    masters: Mapping[str, Tensor],
    index: str = "",
) -> None:
    """One space: its tokens, mixings and :data:`MASTERS`; ``index``, as in "[2]", says in messages which."""
    for name, tokens in (("source", source), ("target", target)):
        _check_tokens(f"{name}{index}", tokens)
    rows_source, rows_target = _row_count("source", source, source_mixing), _row_count("target", target, target_mixing)
    if rows_source != rows_target:
        raise ValueError(
            f"source{index} has {rows_source} rows but target{index} has {rows_target}; mix one side to match the other"
        )
    widths = {"source": source.shape[1], "target": target.shape[1]}
    if not _fits(masters["cross"], widths["source"], widths["target"]):
        raise ValueError(
            f"cross{index} is {list(masters['cross'].shape)} but source{index} has width {widths['source']} "
            f"and target{index} width {widths['target']}"
        )
    for name in MASTERS[1:]:
        side = name.partition("_")[0]
        if masters[name].shape != (widths[side],):
            raise ValueError(f"{name}{index} is {list(masters[name].shape)} but {side}{index} has width {widths[side]}")
    _check_places(
        {f"{name}{index}": tensor for name, tensor in masters.items()}, source, f"source{index}", target=target
    )


def check_effect(
    inputs: Tensor,
    states: Mapping[str, tuple[Tensor, Tensor]],
    mixings: Mapping[str, Mixing | None],
    masters: Mapping[str, Tensor],
) -> None:
    """Inputs of a writer; (after, before) and the row mixing of ``source`` and ``target``; :data:`EFFECT_MASTERS`."""
    tokens = {"inputs": inputs}
    for side, (after, before) in states.items():
        tokens |= {f"{side}_after": after, f"{side}_before": before}
    for name, each in tokens.items():
        _check_tokens(name, each)
    for side, (after, before) in states.items():
        if (after.shape, after.dtype) != (before.shape, before.dtype):
            told = [f"{list(each.shape)} in {each.dtype}" for each in (after, before)]
            raise ValueError(
                f"{side}_after is {told[0]} but {side}_before {told[1]}; both are states of the same tokens"
            )
    rows = {"inputs": _row_count("inputs", inputs, mixings["target"])}
    rows |= {side: _row_count(side, after, mixings[side]) for side, (after, _) in states.items()}
    for side in states:
        if rows[side] != rows["inputs"]:
            raise ValueError(
                f"inputs has {rows['inputs']} rows but {side} has {rows[side]}; mix one to match the other"
            )
    widths = {"input": inputs.shape[1], **{side: after.shape[1] for side, (after, _) in states.items()}}
    for name, tensor in masters.items():
        of = name.partition("_")[0]
        shape = [widths["input"], widths[CROSSES[name]]] if name in CROSSES else [widths[of]]
        if list(tensor.shape) != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {shape} from inputs and states")
    _check_places(masters, inputs, "inputs", **{name: each for name, each in tokens.items() if name != "inputs"})


def _check_tokens(name: str, tokens: Tensor) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"{name} is {list(tokens.shape)}, expected [tokens, width]; flatten leading dimensions")
    if tokens.dtype not in TOKEN_DTYPES:
        raise TypeError(f"{name} is {tokens.dtype}, expected float64, float32, bfloat16 or float16")


def _check_places(masters: Mapping[str, Tensor], first: Tensor, name: str, **others: Tensor) -> None:
    """Masters in float64, and everything where ``first``, called ``name``, is."""
    for other, tensor in {**others, **masters}.items():
        if other not in others and tensor.dtype != torch.float64:
            raise TypeError(f"{other} is {tensor.dtype}, expected torch.float64: moments accumulate in float64")
        if tensor.device != first.device:
            raise ValueError(f"{other} is on {tensor.device} but {name} is on {first.device}")


def check_lists(
    source: Sequence[Tensor],
    target: Sequence[Tensor],
    source_mixing: Mixing | None,
    target_mixing: Mixing | None,
    masters: Mapping[str, Sequence[Tensor]],
) -> None:
    """Several spaces on one device, each with an entry in every list."""
    for name, tensors in {"target": target, **masters}.items():
        if len(tensors) != len(source):
            raise ValueError(f"{name} has {len(tensors)} tensors but source has {len(source)}: one for every space")
    for i, (x, y) in enumerate(zip(source, target, strict=True)):
        if x.device != source[0].device:
            raise ValueError(f"source[{i}] is on {x.device} but source[0] is on {source[0].device}")
        own = {name: tensors[i] for name, tensors in masters.items()}
        check_space(x, y, source_mixing, target_mixing, own, f"[{i}]")


def _fits(cross: Tensor, source: int, target: int) -> bool:
    if cross.dim() != 3:
        return cross.shape == (source, target)
    heads = cross.shape[0]
    return heads > 0 and (heads * cross.shape[1], heads * cross.shape[2]) == (source, target)


def _row_count(name: str, tokens: Tensor, mixing: Mixing | None) -> int:
    if mixing is None:
        return tokens.shape[0]
    row_ptr, column, weight = mixing
    if column is None:
        raise ValueError(f"{name} mixing has no column; pass None instead of the tuple to take the tokens as they are")
    for part, tensor, dtype in (
        ("row_ptr", row_ptr, torch.int64),
        ("column", column, torch.int64),
        ("weight", weight, torch.float64),
    ):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} {part} is {tensor.dtype}, expected {dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} {part} is {list(tensor.shape)}, expected a vector")
        if tensor.device != tokens.device:
            raise ValueError(f"{name} {part} is on {tensor.device} but {name} is on {tokens.device}")
    if weight is not None and weight.shape != column.shape:
        raise ValueError(f"{name} weight has {len(weight)} entries but column has {len(column)}")
    if row_ptr is None:
        return column.shape[0]
    if row_ptr.shape[0] == 0:
        raise ValueError(f"{name} row_ptr is empty, expected rows + 1 elements")
    return row_ptr.shape[0] - 1
