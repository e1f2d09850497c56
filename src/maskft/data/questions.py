"""Questions about labelled pictures, made so that little can be guessed without looking.

    what        What is this?                                       the title
    kind        Which kind of thing is this? Four are offered.      a letter
    name        Which of these is it? Four titles are offered.      a letter
    there       Is there a brown hen in the picture?                yes / no
    belongs     Does this belong to the kind "animals"?             yes / no
    label       What kind of thing is this?                         the kind; only where asked for by name

Of `there` and `belongs`, the same question is asked as often about a picture where the answer is no as where it is yes.
Of `kind` and `name`, what is right for one picture is offered three times where it is wrong.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from maskft.data.easy_vqa import INSTRUCTION
from maskft.data.pictures import Labelled

LETTER = "\nAnswer with the option's letter from the given choices directly."
TYPES = ("what", "kind", "name", "there", "belongs")
ALL_TYPES = (*TYPES, "label")
_OPTIONS = 4


@dataclass(frozen=True)
class Asked:
    """A question about a picture.

    Attributes:
        picture: the picture's name.
        type: one of ALL_TYPES, or of another data set's.
        question: its text, with the instruction how to answer.
        answer: the right one.
        options: what is offered, in the order of the letters; empty where nothing is.
    """

    picture: str
    type: str
    question: str
    answer: str
    options: tuple[str, ...] = ()


def ask(labels: Sequence[Labelled], *, types: Sequence[str] = TYPES, seed: int = 0) -> list[Asked]:
    """All questions of some types about the pictures of one part, in an order drawn by `seed`."""
    draw = random.Random(f"{seed}:questions")
    named = [one for one in labels if one.title]
    sorted_out = [one for one in labels if one.kind]
    asked = [Asked(one.name, "what", f"What is this?{INSTRUCTION}", str(one.title)) for one in named]
    asked += _yes_no(named, "there", lambda one: f"{one.phrase} in the picture?{INSTRUCTION}", _unlike, draw)
    asked += _yes_no(
        sorted_out, "belongs", lambda one: f'Does this belong to the kind "{one.kind}"?{INSTRUCTION}', _other_kind, draw
    )
    even = _even_kinds(sorted_out, draw)
    asked += _choices(even, "kind", "Which kind of thing is this?", lambda one: str(one.kind), _other_kind, draw)
    asked += _choices(named, "name", "Which of these is it?", lambda one: str(one.title), _unlike, draw)
    draw.shuffle(asked)
    stem = f"What kind of thing is this?{INSTRUCTION}"
    labelled = [Asked(one.name, "label", stem, _words(one)) for one in sorted_out]
    draw.shuffle(labelled)
    return [one for one in asked + labelled if one.type in types]


def _words(one: Labelled) -> str:
    return str(one.kind).replace("_", " ")


def _unlike(one: Labelled, other: Labelled) -> bool:
    """Whether the title of `other` is surely not true of `one`: they have no word in common but for short ones."""
    told = {word for word in str(other.title).split() if len(word) > 2} or {str(other.title)}
    return one.title != other.title and not any(_same(a, b) for a in told for b in one.words)


def _same(a: str, b: str) -> bool:
    """Whether two words are one but for a plural's ending, or one is part of the other."""
    return a in b or b.removesuffix("s") in a if min(len(a), len(b)) > 3 else a.rstrip("s") == b.rstrip("s")


def _other_kind(one: Labelled, other: Labelled) -> bool:
    return one.kind != other.kind


def _even_kinds(labels: Sequence[Labelled], draw: random.Random) -> list[Labelled]:
    """Pictures of which no kind has more than a quarter, so that each can be offered where it is wrong."""
    by_kind: dict[str | None, list[Labelled]] = defaultdict(list)
    for one in labels:
        by_kind[one.kind].append(one)
    sizes = [len(members) for members in by_kind.values()]
    most = next((c for c in range(max(sizes, default=0), 0, -1) if _OPTIONS * c <= sum(min(s, c) for s in sizes)), 0)
    return [one for members in by_kind.values() for one in draw.sample(members, min(most, len(members)))]


def _yes_no(
    labels: Sequence[Labelled],
    type_: str,
    question: Callable[[Labelled], str],
    wrong: Callable[[Labelled, Labelled], bool],
    draw: random.Random,
) -> Iterator[Asked]:
    """Each picture's question about itself, and about another one where it is wrong; neither without the other."""
    for i, j in enumerate(_placed(labels, lambda picture, source: wrong(labels[picture], labels[source]), draw)):
        if j is not None:
            text = question(labels[i])
            yield Asked(labels[i].name, type_, text, "yes")
            yield Asked(labels[j].name, type_, text, "no")


def _choices(
    labels: Sequence[Labelled],
    type_: str,
    stem: str,
    said: Callable[[Labelled], str],
    wrong: Callable[[Labelled, Labelled], bool],
    draw: random.Random,
) -> Iterator[Asked]:
    """A question with the right option and three that are right for other pictures."""
    offered: dict[int, list[str]] = defaultdict(list)

    def fits(picture: int, source: int) -> bool:
        return wrong(labels[picture], labels[source]) and said(labels[source]) not in offered[picture]

    for _ in range(_OPTIONS - 1):
        for i, j in enumerate(_placed(labels, fits, draw)):
            if j is not None:
                offered[j].append(said(labels[i]))
    for i, one in enumerate(labels):
        if len(offered[i]) < _OPTIONS - 1:
            continue
        options = [said(one), *offered[i]]
        draw.shuffle(options)
        lines = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
        yield Asked(one.name, type_, f"{stem}{lines}{LETTER}", "ABCD"[options.index(said(one))], tuple(options))


def _placed(labels: Sequence[Labelled], fits: Callable[[int, int], bool], draw: random.Random) -> list[int | None]:
    """For each position i another one j, all different, with fits(j, i); None where there is none left.

    A random permutation, mended by exchanges.
    """
    places = list(range(len(labels)))
    draw.shuffle(places)
    for i in range(len(places)):
        if fits(places[i], i):
            continue
        others = draw.sample(range(len(places)), min(len(places), 200))
        better = (k for k in others if fits(places[k], i) and (fits(places[i], k) or not fits(places[k], k)))
        k = next(better, None)
        if k is not None:
            places[i], places[k] = places[k], places[i]
    return [j if fits(j, i) else None for i, j in enumerate(places)]


def guessed(train: Iterable[Asked], asked: Sequence[Asked]) -> list[str]:
    """Answers without looking at pictures: to a choice, the option that was right most often of the times it was
    offered in training; else the question's most frequent training answer, or its type's."""
    right: Counter[str] = Counter()
    shown: Counter[str] = Counter()
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for one in train:
        for key in (one.question, f"type {one.type}"):
            by_question[key][one.answer] += 1
        shown.update(one.options)
        if one.options:
            right[one.options["ABCD".index(one.answer)]] += 1

    def guess(one: Asked) -> str:
        if one.options:
            rates = [(right[option] + 1) / (shown[option] + _OPTIONS) for option in one.options]
            return "ABCD"[rates.index(max(rates))]
        answers = by_question.get(one.question) or by_question.get(f"type {one.type}")
        return answers.most_common(1)[0][0] if answers else ""

    return [guess(one) for one in asked]


def share_guessed(train: Sequence[Asked], asked: Sequence[Asked]) -> float:
    """Share of answers that each question's most frequent training answer gets right."""
    said = guessed(train, asked)
    return round(sum(one.answer == guess for one, guess in zip(asked, said, strict=True)) / max(len(asked), 1), 4)


def report(parts: Mapping[str, Sequence[Asked]]) -> dict[str, dict[str, dict[str, float | int]]]:
    """By part and type: questions, pictures, chance, and of held-out parts the share that `guessed` gets right; of
    `what` also the share of answers that are an answer in training."""
    train = parts["train"]
    known = {one.answer for one in train if one.type == "what"}
    chance = {"kind": 1 / _OPTIONS, "name": 1 / _OPTIONS, "there": 0.5, "belongs": 0.5}
    found: dict[str, dict[str, dict[str, float | int]]] = {}
    for part, asked in parts.items():
        hits: dict[str, list[bool]] = defaultdict(list)
        for one, said in zip(asked, guessed(train, asked), strict=True):
            hits[one.type].append(one.answer == said)
        found[part] = {}
        for type_ in (name for name in ALL_TYPES if name in hits):
            own = [one for one in asked if one.type == type_]
            row: dict[str, float | int] = {"questions": len(own), "pictures": len({one.picture for one in own})}
            row |= {"chance": chance[type_]} if type_ in chance else {}
            if part == "train":  # whose answers the guesses come from
                found[part][type_] = row
                continue
            row["guessed"] = round(sum(hits[type_]) / len(own), 4)
            if type_ == "what":
                row["answers_in_training"] = round(sum(one.answer in known for one in own) / len(own), 4)
            found[part][type_] = row
    return found
