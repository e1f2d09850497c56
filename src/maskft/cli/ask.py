"""maskft ask"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from maskft.cli.output import print_json, quiet_libraries, result_console
from maskft.errors import DataError


def run(folder: Path, image: Path, question: str, *, as_json: bool) -> None:
    if not image.is_file():
        raise DataError(f"there is no image {image}.")
    quiet_libraries()
    from maskft.data import open_image
    from maskft.evaluation import generate_answers
    from maskft.runs import load_run

    picture = {"path": str(image), "bytes": None}
    open_image(picture)  # an unreadable image is refused before the model is loaded
    loaded = load_run(folder)
    content = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]
    row = {"id": "ask", "images": [picture], "messages": turns, "origin": str(image)}

    def reply(model: Any) -> str:
        longest = loaded.recipe.evaluation.max_new_tokens
        return generate_answers(model, loaded.processor, [row], batch_size=1, max_new_tokens=longest)[0]

    with loaded.base() as base:
        before = reply(base)
    after = reply(loaded.model)
    if as_json:
        print_json({"image": str(image), "question": question, "base": before, "tuned": after})
        return
    table = Table(title=question)
    table.add_column("base", overflow="fold")
    table.add_column("tuned", overflow="fold")
    table.add_row(before, after)
    result_console(as_json).print(table)
