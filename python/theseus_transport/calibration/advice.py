"""What is said of calibration that will do, but not well."""

from __future__ import annotations

from collections.abc import Iterable

from .mixed import GENERAL

NEAR = 0.25  # of a width: so near to it fits are at their worst


def warnings_of_rows(rows: int, widths: Iterable[int]) -> list[str]:
    """What is to be said of so many rows, on which linear layers of these input widths are fitted.

    A fit of as many rows as it reads features follows the noise of every row (double descent): fewer rows do better,
    and so do several times as many.

    Args:
        rows: tokens that pair. widths: of the inputs of what is fitted; none: nothing is.
    """
    known = sorted(set(widths))
    said = []
    if known and rows < 2 * known[-1]:
        said.append(
            f"{rows} calibration rows for a writer that reads {known[-1]} features are fewer than twice as many: "
            f"give at least {4 * known[-1]} (--tokens)"
        )
    if near := [width for width in known if abs(rows - width) <= NEAR * width]:
        said.append(
            f"{rows} calibration rows are about as many as the {near[-1]} features that a writer reads, where a fit is "
            f"at its worst (double descent): give at least {4 * known[-1]} (--tokens)"
        )
    return said


def warning_of_general(calibration: str) -> str:
    """What is to be said where the calibration is general text alone; "" where it is not."""
    if calibration != GENERAL:
        return ""
    return (
        "the calibration is general text alone: text of what the tune is for (vision: images of the task) would bring "
        "more of its effect; give --calibration a file of it, or `self`, which samples text from TUNED"
    )
