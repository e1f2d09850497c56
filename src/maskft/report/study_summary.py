"""The short table of a study with several data sets: a line for each method, a column for each data set."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from maskft.report.study_rows import NOT_RUN, Row, estimate, judged, mean_accuracy, shown, table
from maskft.studies.definition import Study


def by_data(study: Study, found: Sequence[Row]) -> list[str]:
    """Mean accuracy by method and data set in Markdown, the best of a data set in bold once its runs are complete.

    Args:
        found: all lines of the study.

    Returns:
        Its lines; none where the study has one data set only.
    """
    return _summary(list(study.data), found, found) if len(study.data) > 1 else []


def finished(study: Study, found: Sequence[Row]) -> list[str]:
    """As `by_data`, but only what has been run with every seed; no lines where nothing has.

    Args:
        found: all lines of the study.
    """
    done = [row for row in found if len(row.results) == row.seeds]
    names = [name for name in study.data or [""] if any(row.cell.data == name for row in done)]
    return _summary(names, done, found) if done else []


def _summary(names: Sequence[str], told: Sequence[Row], found: Sequence[Row]) -> list[str]:
    """The table of data sets `names` and lines `told`; what is best is asked of all lines, `found`."""
    methods: dict[str, dict[str, Row]] = {}
    for row in told:
        methods.setdefault(json.dumps([row.cell.variant, row.cell.settings]), {})[row.cell.data] = row
    columns = [[row for row in found if row.cell.data == name] for name in names]
    first = [next(iter(part for row in column for part in judged(row)), None) for column in columns]
    best = dict(zip(names, map(_best, columns), strict=True))
    return table(
        ["method", "trained", *names],
        [
            ["base, not trained", "", *("" if part is None else _percent(part.base.accuracy) for part in first)],
            ["best guess without the image", "", *("" if p is None else _percent(p.blind.accuracy) for p in first)],
            *(
                [_name(line), _trained(line.values()), *(_cell(line.get(name), best[name]) for name in names)]
                for line in methods.values()
            ),
        ],
    )


def _name(line: Mapping[str, Row]) -> str:
    row = next(iter(line.values()))
    return " ".join([row.cell.variant, *map(shown, row.cell.settings.values())])


def _trained(line: Iterable[Row]) -> str:
    """How many parameters were trained, as a share of the base's."""
    done = next(iter(result.training for row in line for result in row.results), None)
    if done is None:
        return NOT_RUN
    return f"{done.trainable_parameters / done.base_parameters:.2%}" if done.trainable_parameters else "nothing"


def _best(column: Sequence[Row]) -> float | None:
    """The best mean, once every run is there."""
    complete = all(len(row.results) == row.seeds for row in column)
    return max(mean_accuracy(judged(row)) for row in column) if complete else None


def _cell(row: Row | None, best: float | None) -> str:
    if row is None or not judged(row):
        return NOT_RUN
    mean, low, high = estimate(judged(row))
    text = f"**{_percent(mean)}**" if mean == best else _percent(mean)
    some = f", {len(row.results)} of {row.seeds} runs" if len(row.results) < row.seeds else ""
    return f"{text} ({100 * low:.1f} to {100 * high:.1f}{some})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
