"""Questions about one image share its computation, and get the answers that each gets by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from maskft.data.schema import image_part, text_part, turn
from maskft.evaluation import generate_answers, generation
from maskft.tuner.saved import attach_adapter
from tests.data.helpers import png
from tests.evaluation.tiny import tiny_adapter, tiny_base

COLOURS = ("red", "blue", "lime")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


def rows(folder: Path, images: list[str], before: str = "") -> list[dict[str, Any]]:
    """A question of its own length about each of the images, which are colours."""
    for colour in set(images):
        png(folder / f"{colour}.png", colour)
    texts = ["What?", "What colour is it?", "Is it a circle or is it something else?"]
    opening = [text_part(before)] if before else []
    return [
        {
            "id": str(i),
            "images": [{"path": str(folder / f"{colour}.png"), "bytes": None}],
            "messages": [turn("user", [*opening, image_part(), text_part(texts[i % 3] + "!" * (i % 5))])],
            "origin": f"row {i}",
        }
        for i, colour in enumerate(images)
    ]


class Counted:
    """A model, its processor, and how many images its encoder has seen."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
        self.seen: list[int] = []
        tower = self.model.model.vision_tower
        tower.register_forward_pre_hook(
            lambda _, args, given: self.seen.append(len(args[0] if args else given["pixel_values"])), with_kwargs=True
        )
        if adapter is not None:
            self.model = attach_adapter(self.model, adapter)

    def answers(self, questions: list[dict[str, Any]], batch_size: int) -> list[str]:
        self.seen.clear()
        return generate_answers(self.model, self.processor, questions, batch_size=batch_size, max_new_tokens=6)


@pytest.mark.parametrize("masked", [False, True])
def test_the_same_answers_from_fewer_images(base: Path, tmp_path: Path, masked: bool) -> None:
    counted = Counted(base, tiny_adapter(base, tmp_path / "adapter") if masked else None)
    questions = rows(tmp_path, [COLOURS[i % 3] for i in range(12)])
    alone = counted.answers(questions, batch_size=1)
    assert counted.seen == [1] * 12
    assert len(set(alone)) > 3
    assert counted.answers(questions, batch_size=8) == alone
    assert counted.seen == [2, 1]  # four questions each of two colours, then the third's
    assert counted.answers(questions, batch_size=12) == alone
    assert counted.seen == [3]


def test_what_cannot_be_shared_is_computed_in_full(base: Path, tmp_path: Path) -> None:
    counted = Counted(base)
    apart = rows(tmp_path, list(COLOURS))
    assert counted.answers(apart, 3) == counted.answers(apart, 1)
    texts = [*rows(tmp_path, ["red", "red"], "Look: "), *rows(tmp_path, ["red"])]  # what stands before differs
    together = counted.answers(texts, 3)
    assert counted.seen == [3]
    assert together == counted.answers(texts, 1)
    none = [{**row, "images": [], "messages": [turn("user", [text_part(f"{i}?")])]} for i, row in enumerate(apart)]
    together = counted.answers(none, 3)
    assert counted.seen == []
    assert together == counted.answers(none, 1)


def test_a_model_of_another_kind_is_left_alone() -> None:
    inputs = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(2, 3)}
    assert generation.share_prefix(torch.nn.Linear(1, 1), inputs, ["a", "a"]) == inputs


def test_the_output_layer_gets_rows_in_one_piece(base: Path, tmp_path: Path) -> None:
    counted = Counted(base)
    pieces = []
    head = counted.model.get_output_embeddings()
    with generation._head_on_contiguous_rows(counted.model):
        head.register_forward_pre_hook(lambda _, given: pieces.append(given[0].is_contiguous()))
        counted.answers(rows(tmp_path, list(COLOURS)), 3)
    assert pieces
    assert all(pieces)
    assert len(head._forward_pre_hooks) == 1  # the test's own
