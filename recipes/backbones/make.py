"""More backbones beside the embedded base: their first weights, and the rows they are trained on.

    python recipes/backbones/make.py rows data/shapes data/stamps data/clipart --output data/backbones.json
    python recipes/backbones/make.py captions data/shapes data/digits data/drawings --output data/captions.json
    python recipes/backbones/make.py small-pictures models/small-pictures --projector FILE
    python recipes/backbones/make.py shallow models/small-pictures models/shallow-unhealed
    python recipes/backbones/make.py phi models/small-pictures models/phi-untrained

README.md, in this folder, has all commands in their order. All take vision encoder and processor of the embedded base.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from maskft.data.easy_vqa import COLORS, DESCRIBE, INSTRUCTION, SHAPES
from maskft.data.llava_folder import llava_row
from maskft.folders import refuse_existing, staged
from maskft.vlm.embedded import embedded_base

TURNS = 4
"""Questions about one image in a conversation, at most."""
PICTURES = 400
"""Of stamps and of clip art, as many are drawn: drawn shapes are to be the larger part."""
EVEN = tuple(number for number in range(30) if number % 3 != 1)
"""Twenty of SmolLM2's thirty layers, spread evenly."""
PHI = {
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SIDE = 56
"""Pixels of a small picture's side: 4 x 4 patches."""

Asked = tuple[str, str]


def rows(folders: Sequence[Path], *, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of at most TURNS questions about one image, in LLaVA's form, shuffled.

    Args:
        folders: written by `maskft data`, all in one folder, which image paths become relative to. Rows of
            `easy-vqa --part captions` are asked about in words of our own.
        seed: draws questions and orders.
    """
    draw = random.Random(seed)
    result = []
    for folder in folders:
        told: dict[str, list[Asked]] = defaultdict(list)
        names: dict[str, str] = {}
        for row in json.loads((folder / "train.json").read_text()):
            human, model = (turn["value"] for turn in row["conversations"])
            told[row["image"]].append((human.removeprefix("<image>\n"), model))
            names[row["image"]] = row["id"]
        shapes = {image: name for image, name in names.items() if name.startswith("easy-vqa/train/")}
        for image in shapes:
            told[image] += _about_shape(told[image][0][1], draw)
        chosen = list(shapes) or draw.sample(sorted(told), min(PICTURES, len(told)))
        for image in chosen:
            result.append(_conversation(names[image], f"{folder.name}/{image}", told[image], draw))
    draw.shuffle(result)
    return result


def captions(folders: Sequence[Path], *, seed: int = 0) -> list[dict[str, Any]]:
    """A caption of each training picture of digits and drawings (of their kind), and a question about each drawn shape,
    so that the base doesn't forget to answer what it is asked; shuffled.

    Args:
        folders: written by `maskft data`, all in one folder, which image paths become relative to. A folder given
            several times is seen as often.
        seed: draws the order and the questions about shapes.
    """
    draw = random.Random(seed)
    result = []
    for folder in folders:
        told: dict[str, dict[str, Any]] = {}
        for row in json.loads((folder / "train.json").read_text()):
            image, name = f"{folder.name}/{row['image']}", f"{row['id']}/caption"
            question, answer = (turn["value"] for turn in row["conversations"])
            if question.endswith(DESCRIBE):
                told[image] = llava_row(name, image, [draw.choice(_about_shape(answer, draw))])
            elif said := _caption(row["id"], answer):
                told[image] = llava_row(name, image, [(DESCRIBE, said)])
        result += told.values()
    draw.shuffle(result)
    return result


def _caption(name: str, answer: str) -> str | None:
    """What a row says of its whole picture, as a sentence; None where it says nothing."""
    if name.startswith("digits/"):
        return f"The digit {answer}." if name.endswith("/which") else None
    return f"A drawing of {answer}." if "/label/" in name else None


def _about_shape(caption: str, draw: random.Random) -> list[Asked]:
    """Questions with a caption's truth, such as "A red circle.", in other words than easy-VQA's."""
    _, color, shape = caption.rstrip(".").split()
    pairs = [("Name its color.", color), ("Name its form.", shape)]
    for own, names, question in ((color, COLORS, "Do you see something {}?"), (shape, SHAPES, "Do you see a {}?")):
        named = own if draw.random() < 0.5 else draw.choice([name for name in names if name != own])
        pairs.append((question.format(named), "yes" if named == own else "no"))
    return [(question + INSTRUCTION, answer) for question, answer in pairs]


def _conversation(name: str, image: str, pairs: Iterable[Asked], draw: random.Random) -> dict[str, Any]:
    """Some of the questions; to answer with a word is said once, as in LLaVA's data."""
    chosen = list(pairs)
    draw.shuffle(chosen)
    turns: list[Asked] = []
    for question, answer in chosen[:TURNS]:
        said = any(asked.endswith(INSTRUCTION) for asked, _ in turns)
        turns.append((question.removesuffix(INSTRUCTION) if said else question, answer))
    return llava_row(name, image, turns)


def shallow(base: Path, out: Path, layers: Sequence[int] = EVEN) -> None:
    """A base with some layers of its language model."""
    refuse_existing(out)
    model, processor = _loaded(base)
    text = model.config.text_config
    kept = nn.ModuleList(model.model.language_model.layers[number] for number in layers)
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    model.model.language_model.layers = kept
    text.num_hidden_layers = len(kept)
    text.layer_types = ["full_attention"] * len(kept)
    _write(model, processor, out)


def phi(base: Path, out: Path, seed: int = 0) -> None:
    """A base with a small Phi of random weights in its language model's place, as wide as that, whose embeddings and
    projector stay."""
    from transformers import LlavaForConditionalGeneration, PhiConfig

    refuse_existing(out)
    before, processor = _loaded(base)
    config = copy.deepcopy(before.config)
    width = config.text_config.hidden_size
    special = {name: getattr(config.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": config.text_config.vocab_size, "hidden_size": width, "intermediate_size": 4 * width}
    config.text_config = PhiConfig(**sizes, **PHI, **special)
    config.tie_word_embeddings = True
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(model.model, part).load_state_dict(getattr(before.model, part).state_dict())
    model.get_input_embeddings().load_state_dict(before.get_input_embeddings().state_dict())
    model.tie_weights()
    model.generation_config = before.generation_config
    _write(model, processor, out)


def small_pictures(out: Path, projector: Path | None = None, side: int = SIDE) -> None:
    """The embedded base with pictures of `side` x `side` pixels, a multiple of its patches', and with the projector of
    a file, if one is given."""
    refuse_existing(out)
    model, processor = _loaded(embedded_base())
    if projector is not None:
        model.model.multi_modal_projector.load_state_dict(load_file(projector))
    pictures, square = processor.image_processor, {"height": side, "width": side}
    if pictures.size.get("shortest_edge"):  # resized by that edge, then cut to a square
        pictures.size, pictures.crop_size = {"shortest_edge": side}, square
    else:
        pictures.size = square
    model.config.image_seq_length = (side // processor.patch_size) ** 2
    _write(model, processor, out)


def _loaded(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def _write(model: Any, processor: Any, out: Path) -> None:
    with staged(out) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
    sys.stdout.write(f"{out}: {model.num_parameters():,} parameters\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_rows = parts.add_parser("rows", help="join what `maskft data` wrote into one file of conversations")
    of_rows.add_argument("folders", nargs="+", type=Path)
    of_rows.add_argument("--output", required=True, type=Path)
    of_captions = parts.add_parser("captions", help="captions of pictures and questions about shapes, in one file")
    of_captions.add_argument("folders", nargs="+", type=Path)
    of_captions.add_argument("--output", required=True, type=Path)
    of_shallow = parts.add_parser("shallow", help="a base with twenty of its language model's thirty layers")
    of_shallow.add_argument("base", type=Path)
    of_shallow.add_argument("output", type=Path)
    of_shallow.add_argument("--layers", nargs="+", type=int, default=list(EVEN))
    of_phi = parts.add_parser("phi", help="a base with a small Phi of random weights as its language model")
    of_phi.add_argument("base", type=Path)
    of_phi.add_argument("output", type=Path)
    of_pictures = parts.add_parser("small-pictures", help="the embedded base with 16 tokens an image")
    of_pictures.add_argument("output", type=Path)
    of_pictures.add_argument("--projector", type=Path, help="what stage 1 has learnt; default: the embedded base's own")
    given = parser.parse_args(arguments)
    if given.part in ("rows", "captions"):
        made = captions(given.folders) if given.part == "captions" else rows(given.folders)
        given.output.write_text(json.dumps(made, indent=1))
        sys.stdout.write(f"{given.output}: {len(made):,} conversations\n")
    elif given.part == "shallow":
        shallow(given.base, given.output, given.layers)
    elif given.part == "small-pictures":
        small_pictures(given.output, given.projector)
    else:
        phi(given.base, given.output)


if __name__ == "__main__":
    main()
