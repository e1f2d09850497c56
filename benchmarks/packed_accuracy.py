"""Accuracy of packed adapters against scores in full, on a run's own test questions.

python benchmarks/packed_accuracy.py RUN [RUN ...] [--questions 500] [--storages int8 int4] [--dtype float32]
                                     [--output results.json]

Every form of a run answers the same questions in the same batches. Prints JSON, a line as each form is done.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from maskft.adapters import pack
from maskft.data import answer
from maskft.evaluation.generation import generate_answers
from maskft.evaluation.metrics import exact_match
from maskft.runs import load_data, run_recipe, write_json
from maskft.tuner import attach_saved
from maskft.vlm.load import load_model, load_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--storages", nargs="+", default=["int8", "int4"])
    parser.add_argument("--dtype", help="of the base; default: the run's")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    results = []
    for run in arguments.runs:
        recipe = run_recipe(run)
        settings, dtype = recipe.evaluation, arguments.dtype or recipe.model.dtype
        rows = list(load_data(recipe)["test"])[: arguments.questions]
        processor = load_processor(recipe.model.base)
        model = attach_saved(load_model(recipe.model.base, dtype=dtype), run).eval()
        answers: dict[str, list[str]] = {}
        for storage in ("float32", *arguments.storages):
            with tempfile.TemporaryDirectory() as scratch:
                if storage != "float32":
                    packed = Path(scratch) / "packed"
                    pack(run, packed, storage=storage)
                    model = attach_saved(model.unload(), packed).eval()
                answers[storage] = generate_answers(
                    model,
                    processor,
                    rows,
                    batch_size=settings.batch_size,
                    max_new_tokens=settings.max_new_tokens,
                )
            right = sum(exact_match(said, answer(row)) for said, row in zip(answers[storage], rows, strict=True))
            same = sum(a == b for a, b in zip(answers[storage], answers["float32"], strict=True))
            results.append(
                {
                    "run": run.name,
                    "storage": storage,
                    "dtype": dtype,
                    "questions": len(rows),
                    "right": right,
                    "same_answer": same,
                }
            )
            print(json.dumps(results[-1]), flush=True)
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
