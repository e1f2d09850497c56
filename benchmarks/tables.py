"""Puts the measurements in this folder's CSV files into the tables of docs/performance.md and docs/plan.md.

    python benchmarks/tables.py

Of several measurements of one thing the last one counts. A test compares the pages with what this writes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
PLAN = HERE.parent / "docs" / "plan.md"
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """Rows of a CSV file in this folder, in the order they were measured in."""
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def step() -> str:
    """Ratios of step times, a column for each size of step."""
    found: dict[tuple[str, str], str] = {}
    for row in read("step.csv"):
        tokens, batches = int(row["tokens"]), int(row["accumulate"])
        size = f"{tokens} tokens" if batches == 1 else f"{batches} x {tokens} tokens"
        found[row["method"], size] = f"{float(row['ratio']):.2f} ({row['middle']})"
    sizes = sorted({size for _, size in found}, key=lambda size: ("x" in size, -int(size.split()[-2])))
    methods = list(dict.fromkeys(method for method, _ in found))
    return table(["step time", *sizes], [[m, *(found.get((m, size), "") for size in sizes)] for m in methods])


def memory() -> str:
    """Bytes for each adapted weight beyond weights and activations."""
    found = {row["method"]: row for row in read("memory.csv")}
    rows = [[name, f"{int(r['peak_bytes']) / 2**20:.0f}", r["bytes_per_weight"]] for name, r in found.items()]
    return table(["peak", "MiB of the process", "bytes per adapted weight"], rows)


def adapter() -> str:
    """Sizes of adapters and times to handle them."""
    found = {row["adapter"]: row for row in read("adapter.csv")}
    columns = {
        "MB": lambda r: f"{float(r['bytes']) / 1e6:.1f}",
        "save s": lambda r: f"{float(r['save_s']):.2f}",
        "load s": lambda r: f"{float(r['load_s']):.2f}",
        "merge s": lambda r: f"{float(r['merge_s']):.2f}",
        "switch merged, s": lambda r: f"{float(r['merge_switch_s']):.2f}",
        "switch in a bank, s": lambda r: f"{float(r['bank_switch_s']):.3f}" if r["bank_switch_s"] else "",
        "merged / base forward": lambda r: r["merged_forward_ratio"],
    }
    return table(["adapter", *columns], [[name, *(cell(r) for cell in columns.values())] for name, r in found.items()])


def modes() -> str:
    """Final loss and accuracy of short runs in each memory mode, seed by seed."""
    found: dict[str, list[Row]] = {}
    for row in read("modes.csv"):
        found.setdefault(row["mode"], []).append(row)
    rows = []
    for name, runs in found.items():
        losses = [float(run["final_loss"]) for run in runs]
        shares = [100 * int(run["right"]) / int(run["questions"]) for run in runs]
        each = "; ".join(f"{loss:.3f}, {share:.1f} %" for loss, share in zip(losses, shares, strict=True))
        rows.append([name, f"{fmean(losses):.3f}", f"{fmean(shares):.1f} %", each])
    return table(["mode", "final loss", "accuracy", "each seed"], rows)


def plan_check() -> str:
    """Predicted and measured peaks of a step."""
    found = {}
    for row in read("plan_check.csv"):
        step = f"{row['rows']} x {row['tokens']}" + (", checkpointing" if row["checkpointing"] == "True" else "")
        found[f"{row['base']}, {row['method']}", step] = [row["predicted_mb"], row["measured_mb"], row["ratio"]]
    head = ["base, method", "rows x tokens", "predicted MB", "measured MB", "ratio"]
    return table(head, [[*what, *numbers] for what, numbers in found.items()])


def plan_ranks() -> str:
    """Predicted and measured peaks of one of several processes."""
    found = {}
    for row in read("plan_ranks.csv"):
        step = f"{row['rows']} x {row['tokens']}, {row['ranks']} processes"
        found[f"{row['base']}, {row['method']}", step] = [row["predicted_mb"], row["measured_mb"], row["ratio"]]
    head = ["base, method", "rows x tokens", "predicted MB", "measured MB", "ratio"]
    return table(head, [[*what, *numbers] for what, numbers in found.items()])


def plan_large() -> str:
    """Predicted peaks of one of eight GPUs, by part, in GB."""
    found = {(row["model"], row["method"]): row for row in read("plan_large.csv")}
    parts = ("base", "trained", "moments", "gradients", "gathered", "activations", "total")
    head = ["model, method", *parts]
    return table(head, [[", ".join(what), *(row[part] for part in parts)] for what, row in found.items()])


def answers() -> str:
    """Times per answer beside `generate` on the same batches."""
    found = {row["questions_about_an_image"]: row for row in read("answers.csv")}
    head = ["questions about an image", "s per answer", "`generate` alone, s", "ratio"]
    return table(head, [[each, r["ours_s"], r["plain_s"], r["ratio"]] for each, r in found.items()])


TABLES = {"answers.csv": answers, "step.csv": step, "memory.csv": memory, "adapter.csv": adapter, "modes.csv": modes}
PLAN_TABLES = {"plan_check.csv": plan_check, "plan_ranks.csv": plan_ranks, "plan_large.csv": plan_large}


def render(page: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """The page with its tables made anew; each stands between a pair of comments that name its file."""
    for name, make in tables.items():
        if (HERE / name).exists():
            place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
            assert place.search(page), f"the page has no place for {name}"
            page = place.sub(rf"\g<1>\n{make()}\n\n\g<2>", page)
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PLAN.write_text(render(PLAN.read_text(encoding="utf-8"), PLAN_TABLES), encoding="utf-8")
