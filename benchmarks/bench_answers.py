"""Time to answer questions about images in batches, beside `generate` of Transformers called on the same batches.

    python benchmarks/bench_answers.py [--rounds 5] [--out FILE]

The embedded base with a soft mask, 48 validation questions of easy-VQA in one batch, of which 1, 2 or 8 are about one
image; rounds are paired, medians of their ratios. Rows are appended to a CSV file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from bench_adapter import LAYERS
from common import append, provenance
from peft import get_peft_model

from maskft import MaskConfig
from maskft.data import Collator, load_easy_vqa
from maskft.evaluation import generate_answers
from maskft.memory import keep_freed_memory
from maskft.vlm.load import load_model, load_processor

QUESTIONS, LONGEST = 48, 8


def questions(each: int) -> list[Any]:
    """Rows of which so many are about one image."""
    about = defaultdict(list)
    for row in load_easy_vqa("vqa")["validation"]:
        about[row["images"][0]["path"]].append(row)
    return [row for rows in about.values() if len(rows) >= each for row in rows[:each]][:QUESTIONS]


def plain(model: Any, processor: Any, rows: list[Any]) -> list[str]:
    batch = Collator(processor, max_length=None).prompts(rows)
    with torch.inference_mode():
        tokens = model.generate(**batch, do_sample=False, max_new_tokens=LONGEST)
    new = tokens[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def ours(model: Any, processor: Any, rows: list[Any]) -> list[str]:
    return generate_answers(model, processor, rows, batch_size=len(rows), max_new_tokens=LONGEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/answers.csv"))
    arguments = parser.parse_args()
    keep_freed_memory()
    processor = load_processor("embedded")
    model = get_peft_model(load_model("embedded", dtype="bfloat16"), MaskConfig(target_modules=LAYERS)).eval()
    for each in (1, 2, 8):
        rows = questions(each)
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        for number in range(arguments.rounds + 1):
            for name, ask in (("ours", ours), ("plain", plain)):
                started = time.perf_counter()
                ask(model, processor, rows)
                if number:  # the first round warms up
                    times[name].append((time.perf_counter() - started) / len(rows))
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times["plain"], strict=True))
        row = {
            **provenance(),
            "questions_about_an_image": each,
            "ours_s": f"{statistics.median(times['ours']):.3f}",
            "plain_s": f"{statistics.median(times['plain']):.3f}",
            "ratio": f"{ratio:.2f}",
        }
        print(each, row["ours_s"], row["plain_s"], row["ratio"], flush=True)
        append(arguments.out, [row])


if __name__ == "__main__":
    main()
