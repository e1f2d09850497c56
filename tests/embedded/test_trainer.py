"""The loss on labelled positions is the model's own loss."""

from __future__ import annotations

import pytest
import torch

from maskft.data import IGNORED, Collator, load_easy_vqa
from maskft.trainer import labelled_loss
from maskft.vlm.load import load_model, load_processor


@pytest.mark.parametrize("items", [None, 7])
def test_labelled_loss_is_the_models_loss(items: int | None) -> None:
    rows = load_easy_vqa("vqa", limits={"train": 3, "validation": 1, "test": 1}, turns=3)["train"]
    batch = Collator(load_processor("embedded"))(list(rows))
    model = load_model("embedded", dtype="float32")
    with torch.no_grad():
        expected = model(**batch).loss
        loss = labelled_loss(model, batch, items)
    labels = int((batch["labels"] != IGNORED).sum())
    # fp32 sums over the same terms in another order
    torch.testing.assert_close(loss * (items or labels), expected * labels, rtol=1e-5, atol=0)
