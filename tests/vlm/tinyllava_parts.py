"""Tiny checkpoints in TinyLLaVA Factory's layouts, and a plain restatement of its prompt and forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

from .parts import SIZE, SQUARE, VISION, WORDS, bpe, language_model, spread

FAMILIES = ("phi", "qwen2", "llama", "gemma")
IMAGE = -200
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
EOS = {"phi": "<|endoftext|>", "qwen2": "<|endoftext|>", "llama": "</s>", "gemma": "<eos>"}


class Source(NamedTuple):
    """The modules a checkpoint was written from."""

    family: str
    language: Any
    tower: Any
    connector: nn.Sequential
    tokenizer: Any


def save_tokenizer(family: str, folder: Path, **settings: Any) -> None:
    """The files a slow tokenizer of that family leaves."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"model_max_length": 2048, "padding_side": "right", **settings}
    if family in ("phi", "qwen2"):
        end = EOS[family]
        definition = json.loads(bpe([]).to_str())["model"]
        vocabulary = definition["vocab"]
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in definition["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
        added = {str(len(vocabulary)): {"content": end, "special": True, "normalized": False}}
        kind = {"phi": "CodeGenTokenizer", "qwen2": "Qwen2Tokenizer"}[family]
        names = {"eos_token": end, "bos_token": end, "unk_token": end} if family == "phi" else {"eos_token": end}
        names = {**names, "pad_token": end}
        common |= {"tokenizer_class": kind, "added_tokens_decoder": added, **names}
    else:
        text = folder / "words.txt"
        text.write_text("\n".join(WORDS))
        ids = {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2}
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
        if family == "gemma":
            ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
            names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<unk>"}
        pieces = {"bos_piece": names["bos_token"], "eos_piece": names["eos_token"]}
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=330,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
            **ids,
            **pieces,
        )
        text.unlink()
        (folder / "tokenizer.vocab").unlink()
        kind = {"llama": "LlamaTokenizer", "gemma": "GemmaTokenizer"}[family]
        common = {"tokenizer_class": kind, "add_bos_token": True, "add_eos_token": False, **names, **common}
    (folder / "tokenizer_config.json").write_text(json.dumps(common))


def checkpoint(family: str, folder: Path, *, whole: bool = True, spare_rows: int = 2, **config: Any) -> Source:
    """Write a checkpoint with random weights; `whole` chooses the layout."""
    save_tokenizer(family, folder, **({"legacy": False} if family == "llama" else {}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    language = language_model(family, len(tokenizer) + spare_rows, **ids)
    tower = spread(SiglipVisionModel(SiglipVisionConfig(**VISION)), seed=2)
    hidden = language.config.hidden_size
    connector = spread(nn.Sequential(nn.Linear(16, hidden), nn.GELU(), nn.Linear(hidden, hidden)), seed=3)
    language_tensors = dict(language.named_parameters())
    tower_tensors = {f"vision_model.{key.removeprefix('vision_model.')}": p for key, p in tower.named_parameters()}
    connector_tensors = {f"_connector.{key}": p for key, p in connector.named_parameters()}
    parts = {"language_model": language_tensors, "vision_tower": tower_tensors, "connector": connector_tensors}
    if whole:
        prefixes = {"language_model": "", "vision_tower": "_vision_tower.", "connector": ""}
        tensors = {f"{part}.{prefixes[part]}{key}": p for part, named in parts.items() for key, p in named.items()}
        save_file({key: p.detach().clone() for key, p in tensors.items()}, folder / "model.safetensors")
    else:
        for part, named in parts.items():
            (folder / part).mkdir()
            save_file({key: p.detach().clone() for key, p in named.items()}, folder / part / "model.safetensors")
    content = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "connector_type": "mlp2x_gelu",
        "image_aspect_ratio": "square",
        "image_token_index": IMAGE,
        "llm_model_name_or_path": f"org/{family}",
        "tokenizer_name_or_path": f"org/{family}",
        "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
        "vision_model_name_or_path2": "",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "text_config": language.config.to_dict(),
        "vision_config": {**tower.config.to_dict(), "model_name_or_path": "google/siglip-so400m-patch14-384"},
        "torch_dtype": "float32",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(content))
    return Source(family, language, tower, connector, tokenizer)


def prompt_ids(source: Source, *turns: tuple[str, str | None]) -> list[int]:
    """Token ids of questions and answers, -200 where an image stands; a question without answer is last."""
    text = SYSTEM
    for question, answer in turns:
        if "<image>" in question:
            question = ("<image>\n" + question.replace("<image>", "").strip()).strip()
        text += f"USER: {question} " + ("ASSISTANT:" if answer is None else f"ASSISTANT: {answer}{EOS[source.family]}")
    chunks = [source.tokenizer(chunk)["input_ids"] for chunk in text.split("<image>")]
    begins = chunks[0][:1] == [source.tokenizer.bos_token_id]
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [IMAGE, *(chunk[1:] if begins else chunk)]
    return ids


def pixels(images: list[Image.Image]) -> Tensor:
    """As the published SigLIP image processor makes them."""
    return SiglipImageProcessorPil(size=SQUARE)(images, return_tensors="pt")["pixel_values"]


@torch.inference_mode()
def image_features(source: Source, images: list[Image.Image]) -> Tensor:
    """The connector's output, (images, tokens, hidden); the first token of the tower is left out."""
    hidden = source.tower(pixel_values=pixels(images), output_hidden_states=True).hidden_states[-2]
    return source.connector(hidden[:, 1:])


@torch.inference_mode()
def logits(source: Source, ids: list[int], images: list[Image.Image]) -> Tensor:
    """Logits of one row, (tokens, vocabulary), with each -200 replaced by an image's features."""
    table = source.language.get_input_embeddings().weight
    features = iter(image_features(source, images)) if images else iter(())
    pieces = [next(features) if i == IMAGE else F.embedding(torch.tensor([i]), table) for i in ids]
    embedded = torch.cat(pieces)[None]
    if source.family == "gemma":  # whose forward pass scaled what came in, images included
        embedded = embedded * source.language.config.hidden_size**0.5
    return source.language(inputs_embeds=embedded).logits[0]


__all__ = ["EOS", "FAMILIES", "IMAGE", "SIZE", "Source", "checkpoint", "image_features", "logits", "prompt_ids"]
