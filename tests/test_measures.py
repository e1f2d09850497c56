"""Measures by hand; the picture of a mask has its cells where they belong."""

from __future__ import annotations

import pytest
import torch

from maskft.gates import Centered, Normalized, Soft, Threshold, TopK
from maskft.measures import COLOURS, NAMES, Place, colour, heat_image, measure, top_of


def test_rows_are_measured_by_themselves() -> None:
    m = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    found = measure(m, torch.tensor(0.5), 1.0, torch.tensor([[3.0, 4], [0, 0]]))
    assert found["mean"].tolist() == [0.5, 0.5]
    assert found["spread"].tolist() == [0, 0.5]
    assert found["distance"].tolist() == [0, 0.5]
    assert found["moved"].tolist() == [0, 1]
    assert found["saturated"].tolist() == [0, 1]
    assert found["change"].tolist() == [0.5, 0]
    assert set(found) == set(NAMES) - {"kept"}
    assert measure(m, None, None)["kept"].tolist() == [1, 0.5]


def test_tops() -> None:
    assert top_of(Soft(0.98)) == 1
    assert top_of(Normalized(0.8)) == pytest.approx(1.25)
    assert top_of(Centered()) == 2
    assert top_of(TopK(0.5)) is top_of(Threshold(0.9)) is None


def test_colours() -> None:
    assert colour(-1) == COLOURS[0]
    assert colour(2) == COLOURS[-1]
    assert colour(0.5) == COLOURS[2]
    assert colour(0.125) == tuple(round((a + b) / 2) for a, b in zip(COLOURS[0], COLOURS[1], strict=True))


def test_a_picture_by_hand() -> None:
    values = {Place("language", "q", 0): 0.0, Place("language", "q", 2): 2.0, Place("projector", "linear", -1): 1.0}
    image = heat_image(values, side=2)
    assert image.shape == (3, 4, 6)
    assert tuple(image[:, 0, 0].tolist()) == tuple(image[:, 1, 1].tolist()) == COLOURS[0]
    assert tuple(image[:, 0, 2].tolist()) == (255, 255, 255)
    assert tuple(image[:, 0, 4].tolist()) == COLOURS[-1]
    assert tuple(image[:, 2, 0].tolist()) == COLOURS[2]
    assert heat_image({}).shape == (3, 8, 8)
