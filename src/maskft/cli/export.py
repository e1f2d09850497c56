"""maskft export"""

from __future__ import annotations

from pathlib import Path

from maskft.cli.output import notes, print_json, quiet_libraries, result_console


def run(folder: Path, out: Path, *, as_json: bool) -> None:
    quiet_libraries()
    from maskft.adapters.export import export_merged
    from maskft.data import Collator
    from maskft.folders import refuse_existing
    from maskft.learnt import result_name
    from maskft.runs import load_data, load_run

    refuse_existing(out)
    notes.print(f"merging {folder}")
    loaded = load_run(folder)
    rows = load_data(loaded.recipe)["train"]
    probe = Collator(loaded.processor, max_length=None).prompts([rows[i] for i in range(min(4, len(rows)))])
    difference = export_merged(loaded.model, loaded.processor, out, probe=probe)
    if as_json:
        print_json({"run": str(folder), "merged": str(out), "largest_logit_difference": difference})
    result_console(as_json).print(
        f"largest difference of logits, before merging and after reloading: {difference:g}\n"
        f"run           {folder}\nlearnt        {folder / result_name(loaded.recipe.method)}\nmerged model  {out}"
    )
