"""Probes: the closed form against fits one by one, what they find and what they do not, and where states come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maskft.analysis import probes as module
from maskft.analysis.probes import Attribute, find_attributes, layer_features, probe, ridge_probe
from maskft.data import open_image, read
from maskft.data.turns import join_turns
from maskft.vlm.load import load_model, load_processor
from tests.analysis.runs import COUNTS, make_data
from tests.evaluation.tiny import tiny_base


def separated(count: int, features: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(count) % 3
    x = torch.randn(count, features) * torch.linspace(0.1, 10, features)
    x[:, 3] += 60 * (labels == 1)
    x[:, 5] -= 90 * (labels == 2)
    return x + 5, labels


def test_a_probe_reads_what_is_there() -> None:
    x, labels = separated(200)
    said, _ = ridge_probe(x[:120], labels[:120], x[120:])
    assert (said == labels[120:]).float().mean() > 0.9
    noise = torch.randn(200, 12)
    said, _ = ridge_probe(noise[:120], labels[:120], noise[120:])
    assert (said == labels[120:]).float().mean() < 0.55


def test_more_features_than_examples() -> None:
    x, labels = separated(60, 200)
    said, _ = ridge_probe(x[:40], labels[:40], x[40:])
    assert len(said) == 20
    assert set(said.tolist()) <= {0, 1, 2}


@pytest.mark.parametrize("strength", [1e-4, 1e-1, 10.0])
def test_leaving_one_out_without_fitting_again(strength: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one strength to choose from, the fit is ridge regression on standardised features."""
    monkeypatch.setattr(module, "STRENGTHS", (strength,))
    x, labels = separated(30, 6)
    z = torch.randn(9, 6) * 10
    said, chosen = ridge_probe(x, labels, z)
    assert chosen == strength
    mean, spread = x.double().mean(0), x.double().std(0, correction=0)
    a, b = (x.double() - mean) / spread, (z.double() - mean) / spread
    y = torch.nn.functional.one_hot(labels).double()
    weights = torch.linalg.solve(a.T @ a + strength * len(a) * torch.eye(6, dtype=torch.float64), a.T @ (y - y.mean(0)))
    assert torch.equal(said, (b @ weights + y.mean(0)).argmax(1))


def test_the_strength_follows_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(80) % 2
    noisy = torch.randn(80, 70)
    noisy[:, 0] += 3 * labels
    _, chosen = ridge_probe(noisy, labels, noisy)
    assert chosen > 1e-3
    constant = torch.ones(10, 4)
    said, _ = ridge_probe(constant, torch.tensor([0] * 6 + [1] * 4), constant)
    assert said.tolist() == [0] * 10  # nothing to read: the commonest


def test_attributes_are_questions_with_several_answers(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    train, test = read(data / "train.json"), read(data / "test.json")
    found = find_attributes(train, test)
    assert [one.question for one in found] == ["What colour?", "Is it red?"]
    assert {len(one.train) for one in found} == {COUNTS["train"]}
    assert set(found[0].test.values()) == {"red", "green", "blue"}
    assert len(find_attributes(train, test, most=1)) == 1
    assert find_attributes(train, test, least=COUNTS["test"] + 1) == []


def test_questions_of_a_conversation_count_one_by_one(tmp_path: Path) -> None:
    data = make_data(tmp_path)
    train, test = read(data / "train.json"), read(data / "test.json")
    joined = join_turns(train, 2)
    assert len(joined) < len(train)
    assert find_attributes(joined, test) == find_attributes(train, test)


def test_states_of_every_layer(tmp_path: Path) -> None:
    base, data = tiny_base(tmp_path / "base"), make_data(tmp_path / "data")
    model, processor = load_model(str(base), dtype="float32"), load_processor(str(base))
    images = [row["images"][0] for row in list(read(data / "test.json"))[:15:3]]
    found = layer_features(model, processor, images, batch_size=2)
    assert found["image"].shape == found["last"].shape == (3, 5, model.config.text_config.hidden_size)
    one = layer_features(model, processor, images[4:], batch_size=1)
    torch.testing.assert_close(one["image"][:, 0], found["image"][:, 4])
    torch.testing.assert_close(one["last"][:, 0], found["last"][:, 4])
    shown = model.get_image_features(
        pixel_values=processor.image_processor([open_image(images[0])], return_tensors="pt")["pixel_values"]
    )
    first = shown.pooler_output[0] if hasattr(shown, "pooler_output") else shown[0]
    torch.testing.assert_close(found["image"][0, 0], first.mean(0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["last"][1:, 0], found["last"][1:, 1])  # the image reaches the last token


def test_probe_by_layer() -> None:
    labels = {str(i): "ab"[i % 2] for i in range(40)}
    seen = {name: torch.tensor([[0.0, 1.0], [float(said == "a"), 0.0]]) for name, said in labels.items()}
    attribute = Attribute("?", {k: labels[k] for k in list(labels)[:30]}, {k: labels[k] for k in list(labels)[30:]})
    assert probe(attribute, seen, seen) == [0.5, 1.0]
