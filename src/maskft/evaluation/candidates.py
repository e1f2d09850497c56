"""The models that answer: a base, or a base with what a run learnt. What a name stands for is decided by what is there.

a folder with recipe.yaml          a run: its base with its adapter, its projector or its weights
a folder with adapter_config.json  an adapter: the base named there with the adapter
a folder with config.json          a Transformers model, such as a merged export
embedded, embedded-unaligned       the composed demo model
org/name                           a model of the hub
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskft.errors import AdapterError, ModelError, RunError, UserError
from maskft.learnt import ADAPTER, result_name, worn
from maskft.recipe import ModelSection
from maskft.runs import RECIPE, run_recipe
from maskft.tuner import method_of
from maskft.vlm.embedded import embedded_base

_CONFIG = "adapter_config.json"
_EMBEDDED = {"embedded": True, "embedded-unaligned": False}
_WEIGHTY = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}


@dataclass(frozen=True)
class Candidate:
    """A model to ask.

    Attributes:
        name: short, for files and tables.
        model: the base and how to load it.
        folder: holds what was learnt; None for the base itself.
        learnt: the name of the file in `folder` with what was learnt.
    """

    name: str
    model: ModelSection
    folder: Path | None = None
    learnt: str = ""


def find_candidate(given: str) -> Candidate:
    """What a name on the command line stands for.

    Raises:
        RunError: a run that has not finished.
        AdapterError: an adapter that is incomplete, or whose base is not known.
        ModelError: nothing is there.
    """
    folder = Path(given).expanduser()
    if (folder / RECIPE).is_file():
        return _run(folder)
    if (folder / _CONFIG).is_file():
        return _adapter(folder)
    if given in _EMBEDDED:
        return Candidate(given, ModelSection(base=given))
    if (folder / "config.json").is_file():
        return Candidate(folder.resolve().name, ModelSection(base=given))
    if given.count("/") == 1 and not given.startswith((".", "~", "/")) and not folder.exists():
        return Candidate(given.split("/")[1], ModelSection(base=given))
    raise ModelError(
        f"there is no model '{given}'. Give a run's folder (it holds {RECIPE}), an adapter's ({_CONFIG}), a "
        f"Transformers model's (config.json), a hub id such as 'org/name', or one of {', '.join(_EMBEDDED)}."
    )


def _run(folder: Path) -> Candidate:
    recipe = run_recipe(folder)
    learnt = result_name(recipe.method)
    if not (folder / learnt).is_file():
        raise RunError(
            f"the run {folder} has not finished: {learnt} is missing. Resume it with the same train command."
        )
    return Candidate(folder.resolve().name, recipe.model, folder, learnt)


def _adapter(folder: Path) -> Candidate:
    if not (folder / ADAPTER).is_file():
        raise AdapterError(f"{folder} holds no adapter: {ADAPTER} is missing. Save it again.")
    try:
        base = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{folder / _CONFIG} cannot be read as an adapter's configuration: {error!r}.") from error
    if not isinstance(base, str) or not base:
        raise AdapterError(f"{folder / _CONFIG} names no base. Give the base as MODEL and {folder} with --adapters.")
    return Candidate(folder.resolve().name, ModelSection(base=base), folder, ADAPTER)


def find_candidates(model: str, adapters: Sequence[str]) -> list[Candidate]:
    """The model and the adapters that are tried on its base, under names that differ.

    Raises:
        UserError: one is given twice, one of `adapters` is none, or it belongs to another base.
    """
    first = find_candidate(model)
    found = [first]
    for given in adapters:
        candidate = find_candidate(given)
        if candidate.folder is None:
            raise AdapterError(f"--adapters {given} is a whole model, not an adapter or a run. Give it as MODEL.")
        if not _may_share_base(first, candidate):
            raise AdapterError(
                f"the adapter {given} was trained on another base ({candidate.model.base}) than {model} "
                f"({first.model.base}). Evaluate it by itself."
            )
        found.append(replace(candidate, model=first.model))
    places = [(c.folder or Path(c.model.base)).expanduser().resolve() for c in found]
    if twice := next((place for n, place in enumerate(places) if place in places[:n]), None):
        raise UserError(f"{twice} is given twice.")
    names = [c.name for c in found]
    for longer in range(2, max(len(place.parts) for place in places) + 1):
        if len(set(names)) == len(names):
            break
        names = [
            "-".join(place.parts[-longer:]).replace("/", "") if names.count(name) > 1 else name
            for name, place in zip(names, places, strict=True)
        ]
    return [replace(c, name=name) for c, name in zip(found, names, strict=True)]


def _may_share_base(first: Candidate, other: Candidate) -> bool:
    """False where the two bases are known to differ. A mask's fingerprint is compared as well, when it is loaded."""
    if first.model.base == other.model.base:
        return True
    folders = [base_folder(c.model.base) for c in (first, other)]
    if folders[0] is None or folders[1] is None:
        return other.learnt == ADAPTER and method_of(other.folder or Path()) == "MASK"  # whose fingerprint tells
    return files_digest(_base_files(folders[0])) == files_digest(_base_files(folders[1]))


def base_folder(base: str) -> Path | None:
    """The folder of a base; None for a hub id, and for a folder that is not there."""
    if base in _EMBEDDED:
        return embedded_base(aligned=_EMBEDDED[base])
    folder = Path(base).expanduser()
    return folder if (folder / "config.json").is_file() else None


def _base_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTY and path.is_file())


def files_digest(paths: Sequence[Path]) -> str:
    """SHA-256 over names and contents, hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def base_identity(section: ModelSection) -> str:
    """What tells one base from another: a digest of its files, or the hub's id and commit.

    Raises:
        ModelError: there is no such base.
    """
    if (folder := base_folder(section.base)) is not None:
        return files_digest(_base_files(folder))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(section.base, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load the base '{section.base}': {error}\nIf it lies elsewhere now, give it as MODEL and the "
            "adapter with --adapters."
        ) from error
    return f"{section.base}@{config._commit_hash}"


def learnt_identity(candidate: Candidate) -> str | None:
    """A digest of what was learnt; None for the base itself."""
    if candidate.folder is None:
        return None
    names = (ADAPTER, _CONFIG) if candidate.learnt == ADAPTER else (candidate.learnt,)
    return files_digest([candidate.folder / name for name in names if (candidate.folder / name).is_file()])


@contextlib.contextmanager
def wearing(model: Any, candidate: Candidate) -> Iterator[Any]:
    """The base `model` with what the candidate learnt, for the duration of the block; afterwards it is bare again.

    Raises:
        AdapterError: what was learnt is damaged or belongs to another base.
    """
    if candidate.folder is None:
        yield model
    else:
        with worn(model, candidate.folder, candidate.learnt) as wearer:
            yield wearer
