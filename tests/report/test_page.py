"""The page: complete, self-contained, escaped, accessible in its markup, small and quickly made."""

from __future__ import annotations

import json
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from maskft.errors import RunError
from maskft.report.gather import gather, short_names
from maskft.report.page import render, write_report
from maskft.runs import write_json

from .made import HOSTILE, make_run, metrics, score

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes, and the text; fails on tags that are not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "first")


def page(*folders: Path) -> Page:
    return Page(render(gather(folders)))


def test_one_run(run: Path) -> None:
    shown = page(run)
    for text in (
        "Score on the test questions",
        "guess without image",
        "50.0 %",
        "30.0 %",  # by image, where it is known
        "peak memory bytes",
        "1,000,000,000",
        "Training loss",
        "Validation loss",
        "mean token accuracy",
        "How far gates are from their start, by module",
        "Gates that have moved",
        "Where the mask moved",
        "Values of the gates",
        "Right before, wrong after",
        "Wrong before, right after",
        "gone.png does not exist",
        "torch",
        "init_gate",
        "maskft report",
    ):
        assert text in shown.text or text in str(shown.elements), text
    assert "What the masks have in common" not in shown.text
    assert "{{" not in shown.text


def test_nothing_is_fetched_and_nothing_runs(run: Path) -> None:
    shown = page(run)
    tags = {tag for tag, _ in shown.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attributes in shown.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,"))
    html = render(gather([run]))
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_pictures_have_words_and_data(run: Path) -> None:
    shown = page(run)
    charts = [a for a in shown.all("svg") if a.get("class") == "chart"]
    assert len(charts) >= 8
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 20 for chart in charts)
    assert len(shown.all("figure")) == len(charts)
    assert shown.text.count("Data: ") == len(charts)
    images = shown.all("img")
    assert images
    assert all(image["alt"] for image in images)
    assert shown.all("html") == [{"lang": "en"}]
    identifiers = [a["id"] for _, a in shown.elements if "id" in a]
    assert len(set(identifiers)) == len(identifiers)
    assert {(a["href"] or "").removeprefix("#") for a in shown.all("a")} == set(identifiers)


def test_scores_by_type_of_answer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    found = metrics(0)
    sides = {"base": score(1, 4), "blind": score(3, 4), "tuned": score(3, 4)}
    write_json(run / "metrics.json", {**found, "by_answer_type": {"yes/no": sides, "other": sides}})
    shown = page(run)
    labels = [a["aria-label"] or "" for a in shown.all("svg") if a.get("class") == "chart"]
    assert sum("of yes/no answers" in label or "of other answers" in label for label in labels) == 2
    assert "Score where the answer is yes or no, on the test questions" in shown.text
    assert "Score where the answer is anything else, on the test questions" in shown.text
    assert "3 of 4" in shown.text


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", text=HOSTILE)
    odd = run.rename(tmp_path / "<b>bold&run")
    shown = page(odd, make_run(tmp_path / "second", seed=1))
    assert not shown.all("script")
    assert not shown.all("b")
    assert not [a for a in shown.all("img") if not (a["src"] or "").startswith("data:image/jpeg")]
    assert HOSTILE in shown.text
    assert "<b>bold&run" in shown.text
    assert "49" not in shown.text.split("alert(2)>")[1][:12]


def test_several_runs(run: Path, tmp_path: Path) -> None:
    hard = make_run(tmp_path / "hard", seed=1, gate="threshold", init_gate=0.6)
    other = make_run(tmp_path / "first", seed=2)
    shown = page(run, hard, other)
    for text in (
        "What the masks have in common",
        "What differs",
        "training.seed",
        "method.gate",
        "3 runs",
        "know nothing of each other share",
    ):
        assert text in shown.text, text
    assert "How far gates are from their start, by module" not in shown.text
    rows = [a for a in shown.all("svg") if "Overlap" in (a.get("aria-label") or "")]
    assert len(rows) == 1


def test_runs_of_other_layers_are_left_out_of_the_overlap(run: Path, tmp_path: Path) -> None:
    attention = make_run(tmp_path / "a", modules="attn")
    feeding = make_run(tmp_path / "b", modules="mlp")
    assert "mask no layer in common" in page(attention, feeding).text


def test_a_run_with_nothing_but_a_recipe(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("data: {kind: easy-vqa}\n")
    shown = page(folder)
    for text in (
        "No held-out questions",
        "no training log",
        "has not finished",
        "No answers to show",
        "No environment",
    ):
        assert text in shown.text, text
    (folder / "recipe.yaml").write_text("data: {kind: easy-vqa}\nmethod: {name: projector}\n")
    assert "method is 'projector'; it has no mask" in page(folder).text


def test_a_mask_that_depends_on_its_base(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "hard", gate="threshold", init_gate=0.6)
    make_run(tmp_path / "topk", gate="topk", bits=True)
    shown = page(tmp_path / "topk")
    assert "What the mask keeps" in shown.text
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "gate": "topk"}))
    shown = page(folder)
    assert "The mask cannot be shown" in shown.text
    assert "write it as bits first" in shown.text


def test_twenty_runs_are_quick_and_small(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{seed}", seed=seed) for seed in range(20)]
    started = time.perf_counter()
    size = write_report(runs, tmp_path / "deep" / "report.html")
    assert time.perf_counter() - started < 60
    assert size == (tmp_path / "deep" / "report.html").stat().st_size < 8_000_000


@pytest.mark.parametrize("name", ["log.json", "metrics.json", "answers-test.jsonl", "mask_stats.json"])
def test_a_broken_file_is_named(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text("{")
    with pytest.raises(RunError, match=name):
        gather([run])
    if name == "log.json":
        (run / name).write_text("{}")
        with pytest.raises(RunError, match="not what a run writes there"):
            gather([run])


def test_not_a_run_and_no_place_to_write(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        gather([tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "report.html")


def test_names() -> None:
    assert short_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert short_names([Path("/a/x"), Path("/b/x")]) == ["a/x", "b/x"]
    assert short_names([Path("/a/x"), Path("/a/x")]) == ["x (1)", "x (2)"]
