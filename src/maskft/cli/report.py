"""maskft report"""

from __future__ import annotations

import time
from pathlib import Path

from maskft.cli.output import notes, print_json, quiet_libraries, result_console

PAGE = "report.html"


def run(folders: list[Path], out: Path | None, *, as_json: bool) -> None:
    quiet_libraries()
    from maskft.report.page import write_report

    page = out or (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    started = time.perf_counter()
    size = write_report(folders, page)
    seconds = time.perf_counter() - started
    if as_json:
        report = {"runs": [str(folder) for folder in folders], "report": str(page)}
        print_json({**report, "bytes": size, "seconds": round(seconds, 2)})
    told = f"{len(folders)} run{'s' if len(folders) > 1 else ''}, {size / 1e6:.2f} MB, in {seconds:.1f} s"
    result_console(as_json).print(f"{told}\nreport   {page}", markup=False)


def leave_report(folder: Path) -> str:
    """Write a run's own report, and an adapter's model card; returns the line that says where the report is.

    The line is empty where that failed.

    A run that has trained for hours does not fail for its page: what went wrong is told.
    """
    try:
        from maskft.card import CARD, model_card
        from maskft.learnt import ADAPTER
        from maskft.report.page import write_report
        from maskft.runs import write_atomically

        if (folder / ADAPTER).is_file():  # weights that were trained whole get theirs when they are exported
            write_atomically(folder / CARD, model_card(folder, adapter=True))
        write_report([folder], folder / PAGE)
    except Exception as error:
        notes.print(f"the report could not be written ({error}); try: maskft report {folder}", markup=False)
        return ""
    return f"report   {folder / PAGE}\n"
