"""A survey finds every flaw of every row, however many processes look and however many images are decoded."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from maskft.data import Collator, read, scan
from maskft.data.checks import RowChecks
from maskft.data.lengths import Arithmetic
from maskft.data.rewrite import as_json, rewritten
from maskft.data.survey import Survey, spread, survey

from .helpers import MARKED, PLAIN, llava, make_processor, png, row, write_json


def make_checks(template: str | None, max_length: int | None = None) -> RowChecks:
    return RowChecks(make_processor(template) if template else None, max_length)


PLAIN_CHECKS = functools.partial(make_checks, PLAIN)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten good rows on three images of two sizes, one without image, and three bad rows."""
    png(tmp_path / "a.png", "red", size=(40, 30))
    png(tmp_path / "b.png", "blue", size=(40, 30))
    png(tmp_path / "c.png", "lime", size=(10, 20))
    (tmp_path / "empty.png").touch()
    rows = [llava(f"<image>\n{'shape ' * i}?", "red " * (i + 1), image=f"{'abc'[i % 3]}.png") for i in range(9)]
    rows += [llava("Hi", "yes"), llava(image="none.png"), llava(image="empty.png"), {"conversations": 3}]
    return write_json(tmp_path / "train.json", rows)


def places(found: Survey) -> list[str]:
    return [flaw.place for flaw in found.flaws]


def test_everything_is_counted(data: Path) -> None:
    found = survey(scan(data), PLAIN_CHECKS)
    assert (found.rows, found.flawed, found.images, found.text_only) == (13, 3, 11, 1)
    assert (list(found.widths), list(found.heights)) == ([40, 40, 10], [30, 30, 20])
    assert (found.decoded, len(found.contents)) == (3, 3)
    assert places(found) == ["item 10", "item 11", "item 12"]
    assert "none.png does not exist" in found.flaws[0].text
    assert "empty.png is empty (0 bytes)" in found.flaws[1].text
    assert "'conversations' is int" in found.flaws[2].text
    good = [record.row for record in scan(data) if record.row][:10]
    assert list(found.lengths) == [Collator(make_processor())([one])["input_ids"].shape[1] for one in good]
    assert found.seconds > 0
    as_dict = json.loads(json.dumps(found.to_dict()))
    assert as_dict["tokens"]["max"] == max(found.lengths)
    assert as_dict["seconds_for_665000_rows"] == round(found.seconds / 13 * 665_000)
    assert as_dict["flaws"][0]["place"] == "item 10"


def test_what_max_length_would_cut(data: Path) -> None:
    whole = survey(scan(data), PLAIN_CHECKS)
    limit = sorted(whole.lengths)[5]
    found = survey(scan(data), functools.partial(make_checks, PLAIN, limit))
    over = [length - limit for length in whole.lengths if length > limit]
    assert (found.over, found.cut) == (len(over), sum(over))
    assert found.flawed == 3 + len(over)
    assert any(f"but max_length is {limit}" in flaw.text for flaw in found.flaws)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("images", [1, 2])
def test_lengths_without_decoding_are_the_same(data: Path, template: str, images: int) -> None:
    make = functools.partial(make_checks, template)
    whole, part = survey(scan(data), make), survey(scan(data), make, images=images)
    assert part.lengths == whole.lengths
    assert (part.decoded, list(part.widths), part.flaws) == (images, list(whole.widths), whole.flaws)


def test_too_long_without_decoding(data: Path) -> None:
    make = functools.partial(make_checks, PLAIN, 45)
    assert survey(scan(data), make, images=1).flaws == survey(scan(data), make).flaws


def test_no_images_decoded_at_all(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey(scan(data), functools.partial(make_checks, None), images=0)
    assert (found.rows, found.decoded, len(found.widths), len(found.lengths)) == (13, 0, 3, 0)
    assert places(found) == ["item 10", "item 11", "item 12"]


def test_two_processes_find_the_same(data: Path) -> None:
    alone, two = survey(scan(data), PLAIN_CHECKS), survey(scan(data), PLAIN_CHECKS, workers=2)
    alone.seconds = two.seconds = 0
    assert two == alone


def test_arithmetic_that_differs_is_not_used(tmp_path: Path) -> None:
    one = row("Q?", "A.", images=[png(tmp_path / "a.png")])
    arithmetic = Arithmetic(Collator(make_processor()))
    assert arithmetic.length(one, [(8, 6)]) is None
    length = len(Collator(make_processor())([one])["input_ids"][0])
    arithmetic.compare(one, [(8, 6)], length)
    assert arithmetic.length(one, [(8, 6)]) == length
    arithmetic.compare(one, [(8, 6)], length + 1)
    assert arithmetic.length(one, [(8, 6)]) is None


def test_arithmetic_of_a_processor_that_refuses(tmp_path: Path) -> None:
    one = row("Q?", "A.", images=[png(tmp_path / "a.png")])
    arithmetic = Arithmetic(Collator(make_processor("{{ raise_exception('no') }}")))
    arithmetic.compare(one, [(8, 6)], 10)
    assert arithmetic.length(one, [(8, 6)]) is None


def test_spread() -> None:
    assert spread([]) is None
    assert spread(range(101)) == {"min": 0, "median": 50, "p99": 99, "max": 100}


def chat(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    return {"messages": messages, "score": 0.5, **more}


def written(kind: str, folder: Path) -> Path:
    content = png(folder / "a.png").read_bytes()
    rows = [chat(f"<image>{i}", images=[{"bytes": content, "path": None}]) for i in range(5)]
    if kind == "folder":
        Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
        return folder / "saved"
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
        return folder / "a.parquet"
    return write_json(folder / f"a{kind}", [{**one, "images": ["a.png"], "ü": "\ud800"} for one in rows])


@pytest.fixture(params=[".json", ".jsonl", ".parquet", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return written(request.param, tmp_path)


def test_rows_are_copied_as_they_were(source: Path, tmp_path: Path) -> None:
    out = tmp_path / f"copy{source.suffix}"
    with rewritten(source, out) as keep:
        for number, record in enumerate(scan(source)):
            if number in (1, 4):
                keep(record)
    before = [record.raw for record in scan(source)]
    assert [record.raw for record in scan(out)] == [before[1], before[4]]
    assert len(read(out)) == 2


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".parquet"])
def test_copies_of_nothing(kind: str, tmp_path: Path) -> None:
    out = tmp_path / f"copy{kind}"
    with rewritten(written(kind, tmp_path), out):
        pass
    assert list(scan(out)) == []


def test_json_with_half_a_pair() -> None:
    assert as_json({"ü": 1}) == '{"ü": 1}'
    assert as_json("\ud800") == '"\\ud800"'
