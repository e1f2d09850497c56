"""Damaged adapters: two thousand and more, put on a model, packed, combined and compared."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskft.adapters import combine, distance, pack
from maskft.adapters.files import SavedAdapter
from maskft.tuner import attach_saved
from tests.adapters.helpers import CONFIG, WEIGHTS, saved
from tests.tuner.models import logits, tiny_llama

from .mutate import JUNK, as_text, damaged_bytes, damaged_value
from .watch import COUNTS, Watch

KINDS: dict[str, dict[str, Any]] = {
    "soft": {},
    "int8": {"storage": "int8"},
    "int4": {"storage": "int4"},
    "bits": {"gate": "threshold", "storage": "bits"},
    "topk": {"gate": "topk"},
    "low-rank": {"score_layout": "low-rank", "rank": 2},
    "block": {"score_layout": "block", "block_size": 4},
    "head": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One sound adapter of each kind."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, fields in KINDS.items():
        storage = fields.get("storage")
        plain = {key: value for key, value in fields.items() if key != "storage"}
        saved(folder / f"{name}-full", **plain)
        if storage is not None:
            pack(folder / f"{name}-full", folder / name, storage)
        else:
            (folder / f"{name}-full").rename(folder / name)
    return {name: folder / name for name in KINDS}


def damaged_header(draw: random.Random, content: bytes) -> bytes:
    """A file of tensors whose header says something else."""
    (length,) = struct.unpack("<Q", content[:8])
    header = as_text(damaged_value(draw, json.loads(content[8 : 8 + length])))
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def damage_tensors(draw: random.Random, file: Path) -> None:
    """Give a tensor another shape, dtype or name, or values that are no numbers; the file itself is sound."""
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    tensor, kind = tensors.pop(name), draw.randrange(8)
    if kind == 0:
        tensors[name + draw.choice(("x", ".bits", ".int8", ".scale", ".shape"))] = tensor
    elif kind == 1:
        tensors[name] = tensor.flatten()[: draw.randrange(tensor.numel() + 1)].clone()
    elif kind == 2:
        tensors[name] = tensor.unsqueeze(0).repeat(2, *[1] * tensor.dim())
    elif kind == 3:
        dtypes = (torch.int64, torch.uint8, torch.bool, torch.float64, torch.complex64, torch.float8_e4m3fn)
        tensors[name] = tensor.to(torch.float32).to(draw.choice(dtypes))
    elif kind == 4 and tensor.is_floating_point() and tensor.numel():
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[draw.randrange(tensor.numel())] = draw.choice((float("nan"), float("inf")))
    elif kind == 5:
        tensors[name] = torch.tensor(draw.choice(([2**40, 2**22], [-1, 5], [0], [10**9, 10**9], [2] * 9)))
    elif kind == 6:
        tensors[name] = torch.zeros(())
    save_file(tensors, file)


def damage(draw: random.Random, folder: Path) -> None:
    """Do one thing to an adapter's files."""
    weights, config = folder / WEIGHTS, folder / CONFIG
    kind = draw.randrange(9)
    if kind <= 1:
        weights.write_bytes(damaged_bytes(draw, weights.read_bytes()))
    elif kind == 2:
        weights.write_bytes(damaged_header(draw, weights.read_bytes()))
    elif kind <= 4:
        damage_tensors(draw, weights)
    elif kind == 5:
        config.write_bytes(damaged_bytes(draw, config.read_bytes()))
    elif kind == 6:
        config.write_bytes(as_text(damaged_value(draw, json.loads(config.read_text()))))
    elif kind == 7:
        settings = json.loads(config.read_text())
        config.write_bytes(as_text({**settings, draw.choice(sorted(settings)): draw.choice(JUNK)}))
    else:
        draw.choice((weights, config)).unlink()


@pytest.mark.parametrize("every", COUNTS)
def test_damaged_adapters(every: bool, adapters: dict[str, Path], tmp_path: Path) -> None:
    draw, watch = random.Random(0), Watch(tmp_path)
    case, out = tmp_path / "case", tmp_path / "out"
    for number in range(2400 if every else 96):
        source = adapters[draw.choice(sorted(adapters))]
        shutil.copytree(source, case)
        base = 5 if draw.random() < 0.1 else 0
        if base == 0 or draw.random() < 0.5:
            damage(draw, case)
        action = number % 4
        if action <= 1:
            watch.attempt(lambda: logits(attach_saved(tiny_llama(seed=base), case)).shape)  # noqa: B023
        elif action == 2:
            storage = draw.choice(("float32", "int8", "int4", "bits"))
            watch.attempt(lambda: pack(case, out, storage, model=tiny_llama()))  # noqa: B023
        elif draw.random() < 0.5:
            watch.attempt(lambda: distance(case, source))  # noqa: B023
        else:
            operation = draw.choice(("union", "intersection", "interpolate", "product"))
            watch.attempt(lambda: combine(operation, [source, case], out))  # noqa: B023
        if out.exists():
            SavedAdapter(out)
            shutil.rmtree(out)
        assert {path.name for path in tmp_path.iterdir()} == {"case"}
        shutil.rmtree(case)
    watch.finish(accepted=5, refused=20)
