"""What a study's analyses found, as tables: whatever numbers they give by name, none of the names known here."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from maskft.report.study_rows import NOT_RUN, Row, judged, shown, table
from maskft.studies.after import NOT_DONE
from maskft.studies.definition import Study

Numbers = dict[str, float]
_TYPES = {"y": "yes/no", "n": "number", "o": "other"}


def numbers(found: Any) -> Numbers:
    """The numbers of an object by name; those inside lists and other objects are details, which stay in the JSON."""
    return {key: v for key, v in found.items() if isinstance(v, int | float)} if isinstance(found, dict) else {}


def found_in_runs(study: Study, found: Sequence[Row]) -> list[str]:
    """A section for each analysis under `after` that has numbers: their means over the seeds, line by line."""
    lines = []
    for name in study.after:
        told = [[result.after[name] for result in row.results if name in result.after] for row in found]
        reasons = Counter(one[NOT_DONE] for own in told for one in own if isinstance(one, dict) and NOT_DONE in one)
        by_row = [[values for one in own if (values := numbers(one))] for own in told]
        section = _section(found, by_row)
        section += [f"Not done of {count} runs: {why}" for why, count in reasons.items()]
        if section:
            lines += [f"## {name.capitalize()}", "", *section, ""]
    return lines


def by_answer_type(study: Study, found: Sequence[Row]) -> list[str]:
    """A section of mean accuracies by type of answer, of the data sets that have more than one type.

    Args:
        found: all lines of the study.

    Returns:
        Its lines; none where no data set is known to have several types.
    """
    methods: dict[str, dict[str, Row]] = {}
    columns: dict[tuple[str, str], str] = {}
    for row in found:
        name = " ".join([row.cell.variant, *map(shown, row.cell.settings.values())])
        methods.setdefault(name, {})[row.cell.data] = row
        types = next((part.answer_types for part in judged(row) if part.answer_types), "")
        for letter in sorted(set(types)) if len(set(types)) > 1 else ():
            title = " ".join(filter(None, (row.cell.data, _TYPES[letter])))
            columns[row.cell.data, letter] = f"{title}, {types.count(letter):,} questions"
    if not columns:
        return []
    lines = [
        [name, *(_of_type(own.get(data), letter) for data, letter in columns)]
        for name, own in methods.items()
        if any(row.results for row in own.values())
    ]
    return ["## By type of answer", "", *table(["runs", *columns.values()], lines), "", "Mean accuracy over runs.", ""]


def _of_type(row: Row | None, letter: str) -> str:
    """Mean accuracy of the questions of one type, over the runs whose types are known."""
    known = [part for part in judged(row) if part.answer_types] if row else []
    right = [
        statistics.fmean(s for s, t in zip(part.scores(), part.answer_types or "", strict=True) if t == letter)
        for part in known
    ]
    return f"{100 * statistics.fmean(right):.1f} %" if right else NOT_RUN


def between_seeds(across: Sequence[Mapping[str, Any]]) -> list[str]:
    """What runs that differ in their seeds have in common, a line for each variant, data set and axis values."""
    told = [{name: numbers(one) for name, one in row["found"].items()} for row in across]
    columns = list(dict.fromkeys((name, key) for row in told for name, found in row.items() for key in found))
    lines = []
    for row, own in zip(across, told, strict=True):
        settings = (shown(value) for value in row["settings"].values())
        values = (own.get(name, {}).get(key) for name, key in columns)
        name = " ".join(filter(None, (row["variant"], row["data"], *settings)))
        lines.append([name, *(NOT_RUN if value is None else f"{value:.4g}" for value in values)])
    reasons = Counter(found[NOT_DONE] for row in across for found in row["found"].values() if NOT_DONE in found)
    said = [f"Not done in {count} lines: {why}" for why, count in reasons.items()]
    return [*table(["runs", *(f"{name}: {_words(key)}" for name, key in columns)], lines), "", *said]


def at_paper_scale(plan: Mapping[str, Any]) -> list[str]:
    """What plan.json says of the study's runs on a paper's model and data."""
    gpus = plan["gpus"]
    told = [
        [
            variant,
            f"{one['trainable_parameters'] / 1e6:,.1f}M, {one['trainable_parameters'] / one['base_parameters']:.1%}",
            f"{one['bytes'] / 1e9:.1f} GB",
            f"{one['bytes_of_copies'] / 1e9:.1f} GB",
            "yes" if one["fits"] else "no",
            f"{one['epochs']:.4g}",
            f"{one['hours'] / gpus:.2g} h",
        ]
        if one
        else [variant, "nothing", *[""] * 5]
        for variant, one in plan["variants"].items()
    ]
    copies = f"each of {gpus} copies"
    head = ["variant", "trained", "memory: one GPU", copies, f"fits {plan['gpu']}", "epochs", f"a run on {gpus} GPUs"]
    runs = f"{plan['runs']} runs" + (f" and {plan['trials']} of tuning" if plan["trials"] else "")
    total = f"{plan['gpu_hours'] / gpus:,.0f} hours on {gpus} GPUs of {plan['gpu']}"
    return [
        f"Recipe `{plan['recipe']}` with each variant's model and method; {plan['rows']:,} rows an epoch.",
        "",
        *table(head, told),
        "",
        f"{runs}: {total}, {plan['gpu_hours']:,.0f} GPU hours in all. Memory is planned (`maskft plan`), hours of A100 "
        "are [estimated from the arithmetic alone](../paper.md#cost); nothing of it is measured.",
        "",
    ]


def _section(found: Sequence[Row], by_row: Sequence[Sequence[Numbers]]) -> list[str]:
    """A table of the numbers that differ between runs, and a line of those that don't; empty without numbers."""
    every = [values for own in by_row for values in own]
    keys = list(dict.fromkeys(key for values in every for key in values))
    same = [key for key in keys if len(every) > 1 and len({values.get(key) for values in every}) == 1]
    varied = [key for key in keys if key not in same]
    lines = []
    if varied:
        told = [
            [row.name, *(_mean([values[key] for values in own if key in values]) for key in varied)]
            for row, own in zip(found, by_row, strict=True)
        ]
        lines += [*table(["runs", *map(_words, varied)], told), ""]
        lines += ["Mean over runs, in brackets the lowest and the highest.", ""]
    if same:
        lines += [f"The same in all runs: {', '.join(f'{_words(key)} {_number(every[0][key])}' for key in same)}.", ""]
    return lines


def _mean(values: Sequence[float]) -> str:
    if not values:
        return NOT_RUN
    if all(isinstance(value, bool) for value in values):
        return f"{sum(values)} of {len(values)}"
    spread = f" ({_number(min(values))} to {_number(max(values))})" if len(set(values)) > 1 else ""
    return _number(statistics.fmean(values)) + spread


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1000 else f"{value:.4g}"


def _words(key: str) -> str:
    return key.replace("_", " ")
