"""Damaged recipes: two thousand, accepted with a round trip, or refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskft.recipe import Recipe, load_recipe
from maskft.training import training_arguments

from .mutate import JUNK, damaged_bytes, damaged_value
from .watch import COUNTS, Watch

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
FILES = """
model: {base: org/name, dtype: float32, quantization: none}
method: {name: mask, gate: topk, scope: [language], layers: "0-3,8", target_modules: null, keep_ratio: 0.7}
data: {kind: files, train: train.json, format: llava, split: {validation: 0.1, test: 0.1, seed: 3}}
training: {learning_rate: 1e-3, max_steps: 4, save_steps: 2, lr_scheduler_type: cosine, seed: 1, max_length: 512}
evaluation: {batch_size: 4, metric: vqa}
audit: {strict: true}
"""
SNIPPETS = (
    "a: &a [1]\nb: *a\n",
    "a: &a [*a]\n",
    "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" if i else "x0: &x0 [1]\n" for i in range(12)),
    "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" if i else "m0: &m0 {a: 1}\n" for i in range(40)),
    "x: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "x: !!binary aGVsbG8=\n",
    "x: !!set {a, b}\n",
    "x: !!timestamp 2026-13-45\n",
    "x: !!int " + "9" * 6000 + "\n",
    "? [1, 2]\n: x\n",
    "x: " + "[" * 5000,
    "x: " + "{a: " * 5000,
    "- " * 3000 + "x\n",
    "--- a\n--- b\n",
    "%YAML 9.9\n---\na: 1\n",
    "x: 'unfinished\n",
    "training: {learning_rate: 0x10, seed: 0b1, max_steps: 1_000, save_steps: .inf}\n",
    "method: {temperature: .nan}\n",
    "method: {target_modules: '(a|b)*(c+)+d'}\n",
    "method: {layers: '0-99999999999999'}\n",
)


def damaged(draw: random.Random, text: str) -> bytes:
    kind = draw.randrange(4)
    if kind == 0:
        return damaged_bytes(draw, text.encode())
    if kind == 1:
        return draw.choice((text + draw.choice(SNIPPETS), draw.choice(SNIPPETS) + text, draw.choice(SNIPPETS))).encode()
    value: Any = yaml.safe_load(text)
    for _ in range(draw.randrange(1, 3)):
        value = damaged_value(draw, value)
    return yaml.safe_dump(value, allow_unicode=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def accept(path: Path, overrides: list[str]) -> Recipe:
    recipe = load_recipe(path, overrides)
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(path).to_yaml() == recipe.to_yaml()
    training_arguments(recipe, path.parent)
    return recipe


@pytest.mark.parametrize("every", COUNTS)
def test_damaged_recipes(every: bool, tmp_path: Path) -> None:
    draw, watch = random.Random(0), Watch(tmp_path)
    texts = [FILES, FILES, *(path.read_text() for path in SHIPPED)]
    path = tmp_path / "recipe.yaml"
    keys = ("method.gate", "model.base", "data.split.test", "method.layers", "x", "a.b.c", "data", "training.max_steps")
    for _ in range(2000 if every else 100):
        text = draw.choice(texts)
        overrides = []
        if draw.random() < 0.2:
            path.write_text(text)
            overrides = [f"{draw.choice(keys)}={draw.choice((*JUNK, *SNIPPETS))}"]
        else:
            path.write_bytes(damaged(draw, text))
        watch.attempt(lambda: accept(path, overrides))  # noqa: B023
    watch.finish(accepted=5, refused=20)
    assert [one.name for one in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets(snippet: str, tmp_path: Path) -> None:
    watch, path = Watch(tmp_path), tmp_path / "recipe.yaml"
    path.write_text(snippet)
    watch.attempt(lambda: accept(path, []))
    watch.finish(accepted=0, refused=1)
