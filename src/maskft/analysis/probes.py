"""Which attribute of an image can be read from which layer, before and after tuning: linear probes in closed form.

A probe is ridge regression on one-hot targets; the largest output is its answer. Its strength is the one with the
fewest leave-one-out errors in training, which need no second fit: with the hat matrix H, the prediction of y_i without
example i is (H y - H_ii y)_i / (1 - H_ii).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskft.data import Collator, image_key
from maskft.data.easy_vqa import DESCRIBE, questions_of
from maskft.data.schema import image_part, text_part, turn
from maskft.errors import RunError
from maskft.runs import load_run

STRENGTHS = tuple(10.0**power for power in range(-4, 4))
"""Of the ridge, in units of the features' variance times the examples."""
LOOKS = (("image", "base"), ("image", "tuned"), ("last", "base"), ("last", "tuned"))
"""Where hidden states are taken from, and of which model."""
LEAST = 20
"""Images an attribute needs in training and in test."""


@dataclass(frozen=True)
class Attribute:
    """Something that is asked about many images.

    Attributes:
        question: that asks for it.
        train, test: answer by image.
    """

    question: str
    train: Mapping[str, str]
    test: Mapping[str, str]


def ridge_probe(train: Tensor, labels: Tensor, test: Tensor) -> tuple[Tensor, float]:
    """Fit a probe and answer.

    Args:
        train: features (examples, features).
        labels: classes from 0 on (examples,).
        test: features (others, features).

    Returns:
        (classes (others,), the strength that was chosen).
    """
    mean, spread = train.double().mean(0), train.double().std(0, correction=0)
    scale = spread.where(spread > 1e-6 * spread.max().clamp(min=1e-12), torch.inf)
    x, z = ((part.double() - mean) / scale for part in (train, test))
    y = torch.nn.functional.one_hot(labels, int(labels.max()) + 1).double()
    middle = y.mean(0)
    y = y - middle
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    rotated = u.T @ y
    count = len(x)

    def left_out_errors(strength: float) -> int:
        shrunk = s.square() / (s.square() + strength * count)
        own = (u.square() * shrunk).sum(1, keepdim=True) + 1 / count  # the mean is fitted too
        fitted = u @ (shrunk.unsqueeze(1) * rotated)
        left_out = (fitted - own * y) / (1 - own).clamp(min=1e-9)
        return int(((left_out + middle).argmax(1) != labels).sum())

    best = min(reversed(STRENGTHS), key=left_out_errors)  # of equals the strongest
    weights = vt.T @ ((s / (s.square() + best * count)).unsqueeze(1) * rotated)
    return (z @ weights + middle).argmax(1), best


@torch.inference_mode()
def layer_features(
    model: Any,
    processor: Any,
    images: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Tensor]:
    """Hidden states of the language model about images, layer by layer, its embeddings first.

    Returns:
        {"image": mean over the image's tokens, "last": at the last token of the prompt}, each (layers + 1, images,
        features) in fp32.
    """
    collator = Collator(processor, max_length=None)
    found: dict[str, list[Tensor]] = {"image": [], "last": []}
    for start in progress(range(0, len(images), batch_size)):
        batch = collator.prompts([_row(image) for image in images[start : start + batch_size]])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
        states = model(**inputs, output_hidden_states=True, use_cache=False).hidden_states
        shown = (inputs["input_ids"] == processor.image_token_id).unsqueeze(-1)
        stacked = torch.stack([state.float() for state in states])  # (layers + 1, images, tokens, features)
        found["image"].append(((stacked * shown).sum(2) / shown.sum(1)).cpu())
        found["last"].append(stacked[:, :, -1].cpu())  # prompts are padded on the left
    return {place: torch.cat(parts, dim=1) for place, parts in found.items()}


def find_attributes(train: Iterable[Any], test: Iterable[Any], *, most: int = 6, least: int = LEAST) -> list[Attribute]:
    """Questions with several answers that are asked about many images of both parts, those with most answers first.

    Args:
        train, test: canonical rows.
        most: attributes to return at most.
        least: images each needs in both parts.
    """
    asked = [_by_question(rows) for rows in (train, test)]
    found = []
    for question, answers in asked[0].items():
        times = Counter(answers.values())
        known = {said for said, count in times.items() if count >= 2}
        parts = [{i: said for i, said in part.get(question, {}).items() if said in known} for part in asked]
        if len(known) > 1 and min(map(len, parts)) >= least and len(set(parts[1].values())) > 1:
            found.append(Attribute(question, *parts))
    found.sort(key=lambda one: (-len(set(one.train.values())), -len(one.train), one.question))
    return found[:most]


def probe(attribute: Attribute, train: Mapping[str, Tensor], test: Mapping[str, Tensor]) -> list[float]:
    """Share of the attribute's test images that a probe of each layer gets right.

    Args:
        attribute: of images that have features.
        train, test: features (layers, features) by image.
    """
    classes = {said: number for number, said in enumerate(sorted(set(attribute.train.values())))}
    labels = torch.tensor([classes[said] for said in attribute.train.values()])
    truth = torch.tensor([classes[said] for said in attribute.test.values()])
    seen = torch.stack([train[image] for image in attribute.train], dim=1)
    unseen = torch.stack([test[image] for image in attribute.test], dim=1)
    return [float((ridge_probe(x, labels, z)[0] == truth).double().mean()) for x, z in zip(seen, unseen, strict=True)]


def probes(run: Path, *, images: int = 300) -> dict[str, Any]:
    """Probe base and tuned model of a run for what its own data ask about.

    Args:
        run: a finished run's folder.
        images: of each part at most; the first ones.

    Returns:
        {"run", "majority", "image_base", "image_tuned", "last_base", "last_tuned", "attributes": [{"question",
        "answers", "train", "test", "majority", "layers": {place: {"base": [...], "tuned": [...]}}}]}, accuracies by
        layer, the embeddings first. The numbers before them are means over the attributes, and of a place ("image",
        "last") over its layers too.

    Raises:
        RunError: not a finished run, or its data ask nothing of enough images.
    """
    loaded = load_run(run)
    rows = {part: _of_first_images(loaded.parts.get(part, ()), images) for part in ("train", "test")}
    attributes = find_attributes(rows["train"], rows["test"])
    if not attributes:
        raise RunError(
            f"the data of {run} have no question that is asked about {LEAST} images of the training and the test part "
            "and has several answers, so there is nothing to probe for."
        )
    shown = {part: _images(rows[part]) for part in rows}
    features: dict[str, dict[str, dict[str, Tensor]]] = {}

    def look(model: Any) -> dict[str, dict[str, Tensor]]:
        return {part: layer_features(model, loaded.processor, list(of.values())) for part, of in shown.items()}

    with loaded.base() as base:
        features["base"] = look(base)
    features["tuned"] = look(loaded.model)

    def by_image(name: str, part: str, place: str) -> dict[str, Tensor]:
        stacked = features[name][part][place]
        return {image: stacked[:, i] for i, image in enumerate(shown[part])}

    found: list[dict[str, Any]] = []
    for one in attributes:
        layers = {
            place: {
                name: probe(one, by_image(name, "train", place), by_image(name, "test", place)) for name in features
            }
            for place in ("image", "last")
        }
        commonest = Counter(one.train.values()).most_common(1)[0][0]
        found.append(
            {
                "question": one.question.splitlines()[0],
                "answers": len(set(one.train.values())),
                "train": len(one.train),
                "test": len(one.test),
                "majority": sum(said == commonest for said in one.test.values()) / len(one.test),
                "layers": layers,
            }
        )
    means = {f"{place}_{name}": _mean(_mean(one["layers"][place][name]) for one in found) for place, name in LOOKS}
    return {"run": str(run), "majority": _mean(one["majority"] for one in found), **means, "attributes": found}


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known)


def _row(image: Mapping[str, Any]) -> dict[str, Any]:
    asked = turn("user", [image_part(), text_part(DESCRIBE)])  # of every image, so that it alone tells the attribute
    return {
        "id": "probe",
        "images": [image],
        "messages": [asked, turn("assistant", [text_part("")])],
        "origin": "probe",
    }


def _by_question(rows: Iterable[Any]) -> dict[str, dict[str, str]]:
    """Answers by question and image."""
    asked: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if len(row["images"]) == 1:
            image = image_key(row["images"][0])
            for question, said in questions_of(row):
                asked[question][image] = said
    return asked


def _images(rows: Iterable[Any]) -> dict[str, Mapping[str, Any]]:
    return {image_key(row["images"][0]): row["images"][0] for row in rows if len(row["images"]) == 1}


def _of_first_images(rows: Iterable[Any], count: int) -> list[Any]:
    """Rows about the first `count` images."""
    kept: list[Any] = []
    seen: set[str] = set()
    for row in rows:
        if len(row["images"]) != 1:
            continue
        key = image_key(row["images"][0])
        if key in seen or len(seen) < count:
            seen.add(key)
            kept.append(row)
    return kept
