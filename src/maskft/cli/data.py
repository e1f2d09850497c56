"""maskft data"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from maskft.cli.output import notes, percent, print_json, progress, quiet_libraries, result_console
from maskft.errors import UserError, did_you_mean

_OF_PICTURES = ("source", "test", "validation", "size", "questions")
KINDS = {
    "stamps": _OF_PICTURES,
    "clipart": _OF_PICTURES,
    "digits": ("test", "validation", "size"),
    "easy-vqa": ("part", "split", "labels"),
}
"""Options by data set."""
_CHOICES = {"part": ("vqa", "captions"), "split": ("official", "compositional"), "labels": ("true", "random")}


def run(kind: str, out: Path, options: dict[str, Any], *, seed: int, as_json: bool) -> None:
    """Each kind has options of its own; they are None where not given."""
    if kind not in KINDS:
        raise UserError(f"there is no data set '{kind}'; there are {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}")
    settings = {name: value for name, value in options.items() if value is not None}
    if others := [f"--{name}" for name in settings if name not in KINDS[kind]]:
        raise UserError(f"{', '.join(others)} cannot be used with {kind}.")
    for name, allowed in _CHOICES.items():
        if (value := settings.get(name)) is not None and value not in allowed:
            raise UserError(f"--{name} is '{value}'; it must be {' or '.join(allowed)}.{did_you_mean(value, allowed)}")
    quiet_libraries()
    if kind == "easy-vqa":
        from maskft.data.variants import write_easy_vqa

        summary = write_easy_vqa(out, seed=seed, **settings)
    elif kind == "digits":
        from maskft.data.digits import write_digits

        summary = write_digits(out, seed=seed, **settings)
    else:
        from maskft.data.llava_folder import write_collection

        source = settings.pop("source", Path("/"))
        if (questions := settings.pop("questions", None)) is not None:
            settings["types"] = [name.strip() for name in questions.split(",")]
        summary = write_collection(kind, source, out, seed=seed, progress=progress("pictures"), **settings)
        if summary["unreadable"]:
            notes.print(f"{len(summary['unreadable'])} picture(s) cannot be decoded; summary.json names them")
    if as_json:
        print_json({"output": str(out), **summary})
    console = result_console(as_json)
    console.print(_pictures_table(summary) if "source" in KINDS[kind] else _table(summary))
    if pairs := summary.get("held_out_pairs"):
        console.print(f"in the test part alone: {', '.join(pairs)}")
    files = "".join(f", {name}: {out / name}.json" for name in summary["pictures"])
    console.print(f"data: {{kind: files{files}}}", markup=False)


def _table(summary: dict[str, Any]) -> Table:
    made = [f"{name} {summary[name]}" for name in _CHOICES if name in summary]
    table = Table(title=", ".join([summary["collection"], *made]))
    for column in ("part", "pictures", "questions", "best guess without looking"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part, pictures in summary["pictures"].items():
        guessed = summary["guessed"].get(part)
        cells = (f"{pictures:,}", f"{summary['questions'][part]:,}", "" if guessed is None else percent(guessed))
        table.add_row(part, *cells)
    return table


def _pictures_table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['collection']}: {sum(summary['pictures'].values()):,} pictures")
    for column in ("part", "question", "questions", "pictures", "chance", "best guess without looking"):
        table.add_column(column, justify="left" if column in ("part", "question") else "right")
    for part, types in summary["questions"].items():
        for number, (name, row) in enumerate(types.items()):
            shares = (percent(row[column]) if column in row else "" for column in ("chance", "guessed"))
            cells = (f"{row['questions']:,}", f"{row['pictures']:,}", *shares)
            table.add_row("" if number else part, name, *cells, end_section=number == len(types) - 1)
    return table
