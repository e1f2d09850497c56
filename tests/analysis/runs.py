"""Finished runs of a tiny random model on pictures of one colour, with answers and logs made up."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.evaluation.tiny import tiny_adapter, tiny_base

COLORS = {"red": (250, 0, 0), "green": (0, 250, 0), "blue": (0, 0, 250)}
COUNTS = {"train": 36, "test": 24}


def make_data(folder: Path) -> Path:
    """train.json and test.json: what colour each picture has, whether it is red, and a question of one answer."""
    for part, count in COUNTS.items():
        rows = []
        for number in range(count):
            name = list(COLORS)[number % 3]
            shade = tuple(max(0, value - number * 3 - (part == "test")) for value in COLORS[name])
            image = folder / f"{part}{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (28, 28), shade).save(image)
            asked = [("What colour?", name), ("Is it red?", "yes" if name == "red" else "no"), ("Is it?", "yes")]
            for question, answer in asked:
                turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
                rows.append({"id": f"{part}{len(rows)}", "image": image.name, "conversations": turns})
        (folder / f"{part}.json").write_text(json.dumps(rows))
    return folder


def make_run(folder: Path, base: Path, data: Path, *, seed: int = 1, method: str = "{name: mask}") -> Path:
    """A run's folder with a random mask."""
    tiny_adapter(base, folder, seed=seed)
    recipe = f"""
model: {{base: {base}, dtype: float32}}
method: {method}
data: {{kind: files, train: {data / "train.json"}, test: {data / "test.json"}}}
training: {{seed: {seed}}}
"""
    (folder / "recipe.yaml").write_text(recipe)
    make_answers(folder, "train", wrong=2)
    make_answers(folder, "test", wrong=6)
    return folder


def make_answers(run: Path, part: str, wrong: int) -> None:
    """Answers of which the first `wrong` are not right; two questions a picture, one with an answer of its own."""
    records = []
    for number in range(20):
        truth = ("yes", "no")[number // 2 % 2]
        said = "maybe" if number < wrong else truth
        base = {"id": str(number), "question": f"Is it {number % 2}?", "image": f"{number // 2}.png"}
        records.append({**base, "group": f"g{number // 2}", "truth": truth, "base": "maybe", "tuned": said})
    (run / f"answers-{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def make_log(run: Path, losses: list[float], held_out: dict[int, float]) -> None:
    """log.json with a training loss every ten steps."""
    entries = [{"step": 10 * (i + 1), "loss": loss, "epoch": 0.1} for i, loss in enumerate(losses)]
    entries += [{"step": step, "eval_loss": loss} for step, loss in held_out.items()]
    (run / "log.json").write_text(json.dumps(sorted(entries, key=lambda entry: entry["step"])))


def make_pair(folder: Path) -> tuple[Path, Path]:
    """Two runs on one base that differ by their seed."""
    base, data = tiny_base(folder / "base"), make_data(folder / "data")
    return make_run(folder / "a", base, data, seed=1), make_run(folder / "b", base, data, seed=2)
