"""Run a notebook and keep its outputs, in a form that is the same on every machine but for what it computes.

python docs/site/notebook.py docs/tutorials/quickstart.ipynb
python docs/site/notebook.py docs/tutorials/quickstart.ipynb somewhere-else.ipynb
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

SECONDS = 600


def source_hash(notebook: Any) -> str:
    """Of the cells as written, so that outputs of other cells are found out."""
    text = "\0".join(f"{cell['cell_type']}:{cell['source']}" for cell in notebook["cells"])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def executed(notebook: Any, folder: Path) -> Any:
    """The notebook with its outputs, run in `folder`; an error in a cell is raised."""
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False)
    client.execute(cwd=str(folder))
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "source_hash": source_hash(notebook),
    }
    return notebook


def main(source: Path, target: Path) -> None:
    """Run `source` and write it with its outputs to `target`."""
    notebook = nbformat.read(source, as_version=4)
    nbformat.write(executed(notebook, source.parent), target)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(given[0], given[-1])
