"""The configuration file of an adapter is read as a stranger's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maskft.adapters.files import SavedAdapter
from maskft.errors import AdapterError, UserError
from maskft.tuner import attach_saved
from tests.tuner.models import tiny_llama

from .helpers import CONFIG, edit, saved, settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temprature": 1.0}, "'temprature' is no key of a mask adapter. Did you mean 'temperature'?"),
        ({"temperature": "hot"}, "temperature is a value of the wrong type: 'hot'"),
        ({"straight_through": 1}, "straight_through is a value of the wrong type"),
        ({"rank": 2.5}, "rank is a value of the wrong type"),
        ({"rank": None}, "rank is a value of the wrong type"),
        ({"target_modules": {"a": 1}}, "target_modules is a value of the wrong type"),
        ({"layers": [[1]]}, "layers is a value of the wrong type"),
        ({"base_fingerprint": 3}, "base_fingerprint is a value of the wrong type"),
        ({"task_type": "SOMETHING", "inference_mode": "yes"}, "inference_mode is a value of the wrong type"),
        ({"task_type": "SOMETHING"}, "Invalid task type: 'SOMETHING'"),
        ({"peft_type": "LORA"}, "holds an adapter of method LORA, not MASK"),
        ({"peft_type": ["MASK"]}, "not MASK"),
        ({"temperature": float("nan")}, "temperature is nan; it must be above 0"),
        ({"target_modules": "(a+)+$"}, "target_modules repeats a group"),
    ],
)
def test_keys_and_values(changes: dict[str, Any], message: str, folder: Path) -> None:
    settings(folder, **changes)
    for use in (SavedAdapter, lambda path: attach_saved(tiny_llama(), path)):
        with pytest.raises(UserError) as caught:
            use(folder)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a JSON object"),
        (b"[]", "is not a JSON object"),
        (b"\xff", "is not a JSON object"),
        (b"[" * 100_000, "is not a JSON object"),
        (b" " * 2_000_000, "has more than 1,048,576 bytes"),
    ],
)
def test_files(content: bytes, message: str, folder: Path) -> None:
    (folder / CONFIG).write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        SavedAdapter(folder)


def test_what_the_tuner_writes_is_accepted(folder: Path) -> None:
    content = json.loads((folder / CONFIG).read_text())
    assert SavedAdapter(folder).settings == content


@pytest.mark.parametrize("rank", [3, 10**12])
def test_another_rank_is_refused_before_scores_are_made(rank: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", score_layout="low-rank", rank=2)
    attach_saved(tiny_llama(), folder)
    settings(folder, rank=rank)
    with pytest.raises(AdapterError, match=f"says that scores have the rank {rank}, and .* holds others"):
        attach_saved(tiny_llama(), folder)
    edit(folder, lambda content: content.clear())
    with pytest.raises(AdapterError, match="holds others"):
        attach_saved(tiny_llama(), folder)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", modules_to_save=["lm_head"])
    name = "base_model.model.lm_head.weight"
    edit(folder, lambda content: content.update({name: content[name][:3].clone()}))
    with pytest.raises(AdapterError, match=r"(?s)cannot be put on LlamaForCausalLM: .*size mismatch"):
        attach_saved(tiny_llama(), folder)
