"""Packing of text, without any tokenizer: pieces and common cuts."""

from pathlib import Path

import numpy as np
from theseus_transport.calibration.documents import TextFile
from theseus_transport.calibration.text import _common_cuts


def test_common_cuts_reach_every_token_once() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        ends = [np.sort(generator.choice(np.arange(1, 200), size=n, replace=True)) for n in (90, 70)]
        cuts = _common_cuts(*ends, bodies=(12, 9))
        for side, (each, body) in enumerate(zip(ends, (12, 9), strict=True)):
            spans = [cut[side] for cut in cuts]
            assert all(0 <= stop - start <= body for start, stop in spans)
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
            assert all(stop == len(each) or each[stop - 1] < each[stop] for _, stop in spans), "cuts end a character"
        assert all(ends[0][cut[0][1] - 1] == ends[1][cut[1][1] - 1] for cut in cuts)


def test_pieces_hold_all_the_text(tmp_path: Path) -> None:
    for text in ("x", "x" * 20_000, "line\n" * 5000, "Äpfel\n\n" * 3000):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        pieces = list(TextFile(tmp_path / "a.txt"))
        assert "".join(pieces) == text and max(map(len, pieces)) <= 8192
