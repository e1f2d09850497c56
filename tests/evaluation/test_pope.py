from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.errors import DataError
from maskft.evaluation.benchmarks import pope
from maskft.evaluation.benchmarks.common import Answer

POST_PROMPT = "\nAnswer the question using a single word or phrase."
ANY_TEXT = st.text(st.characters(exclude_categories=()))


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_pope(data: Path, *, folder: str = "coco") -> None:
    """Two pictures in every category, each asked about a dog (there) and a cat (not there)."""
    where = data / "pope" / folder
    where.mkdir(parents=True, exist_ok=True)
    asked = []
    for start, category in enumerate(pope.CATEGORIES):
        labelled = [
            {"question_id": number, "image": f"{number // 2}.jpg", "text": f"Is there a {thing}?", "label": label}
            for number, (thing, label) in enumerate([("dog", "yes"), ("cat", "no")] * 2)
        ]
        (where / f"coco_pope_{category}.json").write_text(lines(labelled))
        asked += [
            {
                "question_id": 100 * start + row["question_id"],
                "image": row["image"],
                "text": row["text"] + POST_PROMPT,
                "category": category,
            }
            for row in labelled
        ]
    (data / "pope" / "llava_pope_test.jsonl").write_text(lines(asked))


def edit(path: Path, change: Callable[[list[dict]], None]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text(lines(rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_pope(tmp_path)
    return tmp_path


def answers(texts: dict[int, str]) -> list[Answer]:
    return [Answer(id_, "", text) for id_, text in texts.items()]


def everything(text: str) -> dict[int, str]:
    return {100 * start + number: text for start in range(3) for number in range(4)}


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("no", False),
        ("No", False),
        ("No.", False),
        ("No, there is none.", False),
        ("There is not a dog. Yes.", False),
        ("not", False),
        (" no ", False),
        ("n,o", False),  # commas are deleted, not replaced
        ("NO", True),
        ("No!", True),
        ("no\nway", True),
        ("no\t", True),
        ("none", True),
        ("cannot", True),
        ("Yes. No.", True),  # only what is before the first full stop
        (".no", True),
        ("", True),
        ("I do n't know", True),
        ("Yes", True),
        ("Нет", True),
        ("\ud800", True),
    ],
)
def test_how_an_answer_is_read(text: str, yes: bool) -> None:
    assert pope.says_yes(text) is yes


def test_hand_worked_score(data: Path) -> None:
    texts = everything("Yes")
    texts |= {0: "Yes", 1: "No", 2: "No", 3: "Yes"}  # adversarial: one of each kind
    texts |= {100: "Yes", 101: "No", 102: "Yes", 103: "No"}  # popular: all right
    result = pope.score(pope.read(data), answers(texts))
    parts = {name: result.details[name] for name in pope.CATEGORIES}
    assert parts["adversarial"] == {
        "f1": 50.0,
        "accuracy": 50.0,
        "precision": 50.0,
        "recall": 50.0,
        "yes_ratio": 50.0,
        "true_positives": 1,
        "false_positives": 1,
        "true_negatives": 1,
        "false_negatives": 1,
        "questions": 4,
    }
    assert parts["popular"]["f1"] == parts["popular"]["accuracy"] == 100.0
    assert parts["random"] | {"f1": 0} == parts["adversarial"] | {  # yes to everything
        "f1": 0,
        "recall": 100.0,
        "yes_ratio": 100.0,
        "true_positives": 2,
        "false_positives": 2,
        "true_negatives": 0,
        "false_negatives": 0,
    }
    assert parts["random"]["f1"] == pytest.approx(200 / 3)
    assert result.score == pytest.approx((50 + 100 + 200 / 3) / 3)
    assert result.details["mean_accuracy"] == pytest.approx(200 / 3)


def test_no_to_everything_divides_nothing_by_nothing(data: Path) -> None:
    result = pope.score(pope.read(data), answers(everything("No")))
    assert result.score == 0.0
    for name in pope.CATEGORIES:
        part = result.details[name]
        assert (part["f1"], part["precision"], part["recall"], part["yes_ratio"]) == (0.0, 0.0, 0.0, 0.0)
        assert part["accuracy"] == 50.0


@pytest.mark.parametrize(
    ("counts", "expected"),
    # true yes, false yes, true no, false no of public runs on random and adversarial, and what the official script
    # printed: accuracy, precision, recall, F1
    [
        ((1183, 31, 1379, 317), (0.8804123711340206, 0.9744645799011532, 0.7886666666666666, 0.8717759764185703)),
        ((778, 23, 1387, 722), (0.7439862542955327, 0.9712858926342073, 0.5186666666666667, 0.6762277270751847)),
        ((778, 76, 1424, 722), (0.734, 0.9110070257611241, 0.5186666666666667, 0.6610025488530162)),
        ((778, 21, 1479, 722), (0.7523333333333333, 0.9737171464330413, 0.5186666666666667, 0.6768160069595477)),
    ],
)
def test_published_counts_give_the_published_digits(counts: tuple[int, ...], expected: tuple[float, ...]) -> None:
    kinds = [("Yes", True), ("Yes", False), ("No", False), ("No", True)]
    cases = [kind for kind, count in zip(kinds, counts, strict=True) for _ in range(count)]
    labels = {number: ("random", label) for number, (_, label) in enumerate(cases)}
    result = pope.score(pope.Annotations(labels), answers({n: text for n, (text, _) in enumerate(cases)}))
    part = result.details["random"]
    assert tuple(part[name] for name in ("accuracy", "precision", "recall", "f1")) == tuple(100 * x for x in expected)
    assert result.details["popular"]["questions"] == 0


@given(
    texts=st.lists(ANY_TEXT | st.sampled_from(["Yes", "No", "no.", "not"]), min_size=12, max_size=12),
    seed=st.integers(),
)
def test_any_text_in_any_order_gives_one_finite_score(texts: list[str], seed: int) -> None:
    labels = {number: (pope.CATEGORIES[number % 3], number % 2 == 0) for number in range(12)}
    given_answers = answers(dict(enumerate(texts)))
    result = pope.score(pope.Annotations(labels), given_answers)
    assert 0 <= result.score <= 100
    for name in pope.CATEGORIES:
        assert all(math.isfinite(value) for value in result.details[name].values())
        assert all(0 <= result.details[name][key] <= 100 for key in ("f1", "accuracy", "precision", "recall"))
    random.Random(seed).shuffle(given_answers)
    assert pope.score(pope.Annotations(labels), given_answers) == result
    json.dumps(result.to_dict(), allow_nan=False)


def test_missing_doubled_and_unknown_answers_are_named() -> None:
    annotations = pope.Annotations(dict.fromkeys(range(40), ("random", True)))
    wrong = [Answer(number, "", "Yes") for number in [*range(12), *range(11), *range(100, 113)]]
    with pytest.raises(DataError) as caught:
        pope.score(annotations, wrong)
    message = str(caught.value)
    assert "POPE" in message
    for part in ("no answer (28)", "more than one answer (11)", "not a question of this benchmark (13)"):
        assert part in message
    for id_ in (12, 21, 0, 9, 100, 109):
        assert f"- {id_}\n" in message
    for id_ in (22, 10, 110):
        assert f"- {id_}\n" not in message
    assert "... and 18 more" in message


@pytest.mark.parametrize("folder", ["coco", ""])
def test_both_places_of_the_annotations(tmp_path: Path, folder: str) -> None:
    write_pope(tmp_path, folder=folder)
    labels = pope.read(tmp_path).labels
    assert len(labels) == 12
    assert labels[200] == ("random", True)
    assert labels[203] == ("random", False)


def test_questions(data: Path) -> None:
    asked = pope.questions(data)
    assert [question.id for question in asked] == [*range(4), *range(100, 104), *range(200, 204)]
    assert asked[5].text == "Is there a cat?" + POST_PROMPT
    assert asked[5].image == data / "pope" / "val2014" / "0.jpg"
    assert asked[5].category == "popular"
    assert pope.MAX_NEW_TOKENS == 128


def test_order_of_the_annotations_does_not_matter(data: Path) -> None:
    before = pope.read(data)
    edit(data / "pope" / "coco" / "coco_pope_random.json", lambda rows: rows.reverse())
    assert pope.read(data).labels == before.labels


def test_one_question_twice_in_a_category(data: Path) -> None:
    """The k-th occurrence goes with the k-th, and each wants its own answer."""
    edit(data / "pope" / "coco" / "coco_pope_random.json", lambda rows: rows.append(rows[0]))
    with pytest.raises(DataError, match=r"random: 4 questions, 5 annotations .* labels without a question: 1"):
        pope.read(data)
    edit(data / "pope" / "llava_pope_test.jsonl", lambda rows: rows.append(rows[8] | {"question_id": 999}))
    annotations = pope.read(data)
    assert annotations.labels[200] == annotations.labels[999] == ("random", True)
    with pytest.raises(DataError, match="999"):
        pope.score(annotations, answers(everything("Yes")))
    result = pope.score(annotations, answers({**everything("Yes"), 999: "No"}))
    assert result.details["random"]["true_positives"] == 2
    assert result.details["random"]["false_negatives"] == 1

    edit(data / "pope" / "coco" / "coco_pope_random.json", lambda rows: rows[-1].update(label="no"))
    labels = pope.read(data).labels
    assert (labels[200], labels[999]) == (("random", True), ("random", False))


def test_annotations_of_another_release_are_refused(data: Path) -> None:
    """The same number of rows, but about other pictures: by position they would give a score near chance."""
    path = data / "pope" / "coco" / "coco_pope_popular.json"
    edit(path, lambda rows: [row.update(image="other.jpg") for row in rows[:2]])
    with pytest.raises(DataError) as caught:
        pope.read(data)
    message = str(caught.value)
    for part in (
        "llava_pope_test.jsonl",
        "do not belong together",
        f"popular: 4 questions, 4 annotations in {path}",
        "questions without a label: 2, such as 'Is there a dog?' about 0.jpg",
        "labels without a question: 2, such as 'Is there a dog?' about other.jpg",
        "8910",
        "2910",
        "3000",
    ):
        assert part in message
    assert "adversarial:" not in message


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("llava_pope_test.jsonl", lambda rows: rows[1].update(category="rare"), "row 2: category 'rare'"),
        ("llava_pope_test.jsonl", lambda rows: rows[1].update(question_id=0), "row 2: question_id 0 occurs"),
        ("llava_pope_test.jsonl", lambda rows: rows[1].update(question_id=1.5), "row 2: 'question_id' is missing"),
        ("llava_pope_test.jsonl", lambda rows: rows[1].pop("image"), "row 2: 'image' is missing"),
        ("llava_pope_test.jsonl", lambda rows: rows.clear(), "no rows"),
        ("coco/coco_pope_random.json", lambda rows: rows[1].update(label="maybe"), "row 2: label 'maybe'"),
        ("coco/coco_pope_random.json", lambda rows: rows[1].update(text=3), "row 2: 'text' is missing"),
        ("coco/coco_pope_random.json", lambda rows: rows.clear(), "questions without a label: 4"),
    ],
)
def test_flawed_rows(data: Path, file: str, change: Callable[[list[dict]], None], expected: str) -> None:
    edit(data / "pope" / file, change)
    with pytest.raises(DataError) as caught:
        pope.read(data)
    assert expected in str(caught.value)
    assert Path(file).name in str(caught.value)


@pytest.mark.parametrize("file", ["llava_pope_test.jsonl", "coco/coco_pope_adversarial.json"])
def test_missing_and_broken_files(data: Path, file: str) -> None:
    path = data / "pope" / file
    path.write_text(path.read_text() + '{"question_id": \n')
    with pytest.raises(DataError, match=r"(?s)cannot be read.*line \d+"):
        pope.read(data)
    path.unlink()
    with pytest.raises(DataError, match=rf"(?s)missing.*{path.name}"):
        pope.read(data)


@pytest.mark.parametrize("image", ["../val2014.jpg", "/etc/passwd", "a/../../b.jpg", "", "."])
def test_a_picture_outside_the_folder_is_refused(data: Path, image: str) -> None:
    edit(data / "pope" / "llava_pope_test.jsonl", lambda rows: rows[2].update(image=image))
    with pytest.raises(DataError, match=r"(?s)llava_pope_test.jsonl.*row 3"):
        pope.questions(data)
