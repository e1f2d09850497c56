"""maskft gguf"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from maskft.cli.output import print_json, quiet_libraries, result_console


def run(folder: Path, out: Path, *, dtype: str, as_json: bool) -> None:
    quiet_libraries()
    from maskft.vlm.gguf_file import write_gguf

    written = write_gguf(folder, out, dtype=dtype)
    if as_json:
        print_json({"model": str(folder), "gguf": str(out), "dtype": dtype, **asdict(written)})
    result_console(as_json).print(
        f"{written.tensors} tensors, {written.bytes / 1e6:.1f} MB; the language model alone, it does not see\n"
        f"model  {folder}\ngguf   {out}",
        markup=False,
    )
