from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from maskft.data import image_key, leaked_images, split_by_image, to_dataset
from maskft.errors import DataError

from .helpers import png, row


def shared(tmp_path: Path, images: int = 20, questions: int = 3) -> Dataset:
    files = [png(tmp_path / f"{i}.png", (i, 0, 0)) for i in range(images)]
    return to_dataset(row("Q?", "A.", images=[f], origin=f"{f.name} {q}") for q in range(questions) for f in files)


def names(parts: dict[str, Dataset]) -> dict[str, list[str]]:
    return {name: part["origin"][:] for name, part in parts.items()}


def test_fractions_and_no_leak(tmp_path: Path) -> None:
    parts = split_by_image(shared(tmp_path), validation=0.1, test=0.2, seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 42, "validation": 6, "test": 12}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert leaked_images(parts[a], parts[b]) == 0
    assert leaked_images(parts["train"], parts["train"]) == 14


def test_deterministic_by_content_and_seed(tmp_path: Path) -> None:
    data = shared(tmp_path)
    first = names(split_by_image(data, validation=0.1, test=0.2, seed=0))
    assert first == names(split_by_image(data, validation=0.1, test=0.2, seed=0))
    assert first != names(split_by_image(data, validation=0.1, test=0.2, seed=1))
    turned = data.select(range(len(data) - 1, -1, -1))
    again = names(split_by_image(turned, validation=0.1, test=0.2, seed=0))
    assert {name: sorted(rows) for name, rows in again.items()} == {name: sorted(rows) for name, rows in first.items()}


def test_equal_files_and_bytes_stay_together(tmp_path: Path) -> None:
    a, copy, other = png(tmp_path / "a.png"), png(tmp_path / "copy.png"), png(tmp_path / "o.png", "blue")
    data = to_dataset([row("Q?", "A.", images=[i]) for i in (a, copy, a.read_bytes(), other)])
    parts = split_by_image(data, validation=0.0, test=0.25, seed=3)
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [3, 0, 1]
    assert leaked_images(parts["train"], parts["test"]) == 0


def test_rows_with_several_images_join_transitively(tmp_path: Path) -> None:
    a, b, c, d, e = (png(tmp_path / f"{i}.png", (i, 9, 9)) for i in range(5))
    pairs = [[a], [c, d], [b, a], [c, b], [e]]
    for seed in range(10):
        data = to_dataset(row("Q?", "A.", images=list(pair), origin=str(i)) for i, pair in enumerate(pairs))
        parts = split_by_image(data, validation=0.0, test=0.2, seed=seed)
        assert names(parts) == {"train": ["0", "1", "2", "3"], "validation": [], "test": ["4"]}


def test_text_only_rows_are_their_own_groups() -> None:
    data = to_dataset(row(f"{i}?", "A.", origin=str(i)) for i in range(10))
    parts = split_by_image(data, validation=0.2, test=0.3, seed=0)
    assert [len(part) for part in parts.values()] == [5, 2, 3]


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=4, max_size=12), seed=st.integers(0, 9))
def test_every_row_is_in_one_part(sizes: list[int], seed: int) -> None:
    images = [bytes([number]) for number in range(len(sizes))]
    data = to_dataset(row(str(n), images=[images[i]], origin=f"{i}.{n}") for i, k in enumerate(sizes) for n in range(k))
    try:
        parts = split_by_image(data, validation=0.0, test=0.5, seed=seed)
    except DataError:
        return
    assert sorted(name for part in parts.values() for name in part["origin"]) == sorted(data["origin"])
    assert len(parts["test"]) <= max(1, round(0.5 * len(data)))
    assert leaked_images(parts["train"], parts["test"]) == 0


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (-0.1, 0.1, r"validation fraction is -0\.1, but must be at least 0"),
        (0.1, 1.0, r"test fraction is 1\.0"),
        (float("nan"), 0.1, "validation fraction is nan"),
        (0.5, 0.5, "leave nothing for training. Their sum must be below 1"),
    ],
)
def test_bad_fractions(validation: float, test: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_by_image(to_dataset([row("Q?", "A.")]), validation=validation, test=test, seed=0)


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The test part would be empty: 3 rows form 1 group"):
        split_by_image(shared(tmp_path, images=1), validation=0.0, test=0.3, seed=0)
    with pytest.raises(DataError, match=r"The train part would be empty"):
        split_by_image(to_dataset([row("Q?", "A.")]), validation=0.0, test=0.3, seed=0)


def test_missing_image_names_the_row(tmp_path: Path) -> None:
    data = to_dataset([row("Q?", "A.", images=[tmp_path / "none.png"])])
    with pytest.raises(DataError, match=r"a\.json item 0: image file .*none\.png does not exist"):
        split_by_image(data, validation=0.0, test=0.3, seed=0)
    with pytest.raises(DataError, match=r"has the columns \['x'\].*Read it with"):
        split_by_image(Dataset.from_dict({"x": [1]}), validation=0.0, test=0.3, seed=0)


def test_image_is_read_once_per_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("maskft.data.split.image_key", lambda image: calls.append(image) or image_key(image))
    split_by_image(shared(tmp_path, images=5, questions=4), validation=0.0, test=0.2, seed=0)
    assert len(calls) == 5
