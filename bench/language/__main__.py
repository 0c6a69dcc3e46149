"""How much of a tune arrives in another language model, in bits per byte and as a share of training there.

    python bench/language                                        # two models trained apart, LoRA and full, 4 domains
    python bench/language --pairs related --seeds 0 1
    python bench/language --ways coherent "coherent --alpha match" official
    python bench/language --only-train                           # says where the models are

Small byte-pair Llamas of 64 and 96 features are trained here, on text that this machine has (`corpus.py`), and kept in
--folder by all that decides them: the first run takes half an hour on one core, later ones minutes. A tune is of one
domain; the ceiling is the target, tuned the same way. All ways read the same unlabelled rows, which no training saw.
Every cell is a line of JSON in --out. A share is (target - moved) / (target - ceiling), in bits on the test text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import warnings
from pathlib import Path

from corpus import corpus
from measure import Texts, measured, table
from pairs import PAIRS, TUNES, cells
from train import ROW, Shelf
from transformers.utils import logging
from ways import Task

WAYS = "random", "coherent", "effect", "effect --prior none", "official", "head", "steps 8", "proxy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"nargs": "+", "metavar": "X"}
    parser.add_argument("--pairs", default=["apart"], **several, help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--kinds", default=list(TUNES), **several, help=f"of {', '.join(TUNES)}")
    parser.add_argument("--domains", **several, help="all there are")
    parser.add_argument("--seeds", type=int, default=[0], **several)
    parser.add_argument("--ways", default=list(WAYS), **several, help="recipes with the command's options, and others")
    parser.add_argument("--rows", type=int, default=64, help=f"of calibration, each of {ROW} tokens")
    parser.add_argument("--text", choices=("domain", "general", "mix"), default="domain", help="of calibration")
    parser.add_argument("--folder", type=Path, default=Path("build/language"), help="of models")
    parser.add_argument("--out", type=Path, default=Path("build/language/cells.jsonl"), help="lines are added")
    parser.add_argument("--only-train", action="store_true")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    shelf = Shelf(asked.folder, corpus())
    texts, rows = Texts(shelf, asked.text, asked.rows), []
    work = asked.folder / f"moving-{os.getpid()}"
    found = [(pair, asked.kinds, asked.domains or list(shelf.corpus.domains), seed)
             for pair in asked.pairs for seed in asked.seeds]  # fmt: skip
    for cell in (cell for each in found for cell in cells(shelf, *each)):
        name = f"{cell.pair} {cell.kind} {cell.domain} {cell.seed}"
        if asked.only_train:
            print(name, cell.source, cell.tune, cell.target, cell.ceiling)
            continue
        for row in measured(Task(cell, texts.drawn(cell.domain), work), texts, asked.ways):
            rows.append(row)
            with asked.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            bits = f"{row['target']:.3f} -> {row['moved']:.3f} bits a byte, ceiling {row['ceiling']:.3f}"
            print(f"{name} {row['way']}: {bits}, {100 * row['share moved']:.0f} %", flush=True)
    shutil.rmtree(work, ignore_errors=True)
    if rows:
        print(table(rows))


if __name__ == "__main__":
    main()
