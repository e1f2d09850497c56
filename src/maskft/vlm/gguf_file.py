"""The language model of an image-text-to-text folder as a GGUF file, for llama.cpp and what is built on it.

Llama's layout with a byte-level BPE tokenizer, unquantised; other models need llama.cpp's converter. The vision encoder
and the projector are left out. Names, and the order of rows that `_interleaved` makes, are those of llama.cpp's own
files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskft.errors import MissingExtraError, ModelError, RunError

DTYPES = {"f16": torch.float16, "f32": torch.float32}
_CONVERTER = "Use llama.cpp's convert_hf_to_gguf.py on the folder instead."
_OUTER = {"embed_tokens": "token_embd", "norm": "output_norm"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # kinds of tokens


@dataclass(frozen=True)
class Written:
    """Size of a GGUF file."""

    tensors: int
    bytes: int


def write_gguf(folder: Path, out: Path, *, dtype: str = "f16") -> Written:
    """Write the language model of a Transformers folder to the file `out`, which appears only once it is complete.

    Args:
        folder: an exported model, with its processor.
        dtype: "f16" or "f32", of matrices; vectors are written in f32.

    Raises:
        ModelError: no Llama language model, no byte-level BPE tokenizer, or a weight that `dtype` cannot hold.
        RunError: `out` exists.
        MissingExtraError: the package gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError("gguf", "pip install 'maskft[demo]'", "Writing GGUF")
    from gguf import GGUFWriter
    from transformers import AutoModelForImageTextToText, AutoProcessor

    if out.exists():
        raise RunError(f"{out} exists. Give another name, or remove it.")
    if dtype not in DTYPES:
        raise ModelError(f"dtype is '{dtype}'; it must be one of {', '.join(DTYPES)}.")
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", use_safetensors=True)
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load {folder} as an image-text-to-text model: {error}") from error
    config = model.config.get_text_config()
    _require_llama(folder, config)
    part = out.with_name(f".{out.name}.part")
    writer = GGUFWriter(part, "llama")
    try:
        _add_settings(writer, config)
        _add_tokenizer(writer, folder, processor, config.vocab_size)
        count = 0
        for name, tensor in _tensors(model, config):
            cast = tensor.detach().to(torch.float32 if tensor.ndim == 1 else DTYPES[dtype])
            if not torch.isfinite(cast).all():
                raise ModelError(f"'{name}' holds values that {dtype} cannot. Write f32.")
            writer.add_tensor(name, cast.contiguous().numpy())
            count += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return Written(count, out.stat().st_size)


def _require_llama(folder: Path, config: Any) -> None:
    """Raise ModelError where the language model is not laid out as Llama's."""
    rope = getattr(config, "rope_parameters", None) or {}
    flaws = {
        f"its language model is of the type '{config.model_type}'": config.model_type != "llama",
        "its attention or feed-forward layers have biases": getattr(config, "attention_bias", False)
        or getattr(config, "mlp_bias", False),
        f"its positions are of the kind '{rope.get('rope_type')}'": rope.get("rope_type", "default") != "default",
        "it is quantised": getattr(config, "quantization_config", None) is not None,
    }
    if found := [flaw for flaw, there in flaws.items() if there]:
        raise ModelError(f"{folder} cannot be written as GGUF here: {' and '.join(found)}. {_CONVERTER}")


def _add_settings(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, folder: Path, processor: Any, size: int) -> None:
    """Vocabulary, merges and chat template; ids without a token get a name of their own.

    Raises:
        ModelError: the tokenizer is no byte-level BPE whose text is split in a way that llama.cpp has a name for.
    """
    tokenizer = processor.tokenizer
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _name_of_split(definition.get("pre_tokenizer"))
    if definition["model"]["type"] != "BPE" or split is None:
        raise ModelError(
            f"{folder} cannot be written as GGUF here: its tokenizer is no known byte-level BPE. {_CONVERTER}"
        )
    special = {token["id"]: token["special"] for token in definition["added_tokens"]}
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    kinds = {i: _CONTROL if is_special else _USER_DEFINED for i, is_special in special.items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([names.get(i, f"<unused{i}>") for i in range(size)])
    writer.add_token_types([kinds.get(i, _NORMAL if i in names else _CONTROL) for i in range(size)])
    merges = definition["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(False)
    if isinstance(processor.chat_template, str):
        writer.add_chat_template(processor.chat_template)


def _name_of_split(pre_tokenizer: Any) -> str | None:
    """llama.cpp's name for how text is split before byte pairs are merged; None where it is not one of two."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [(step or {}).get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and not steps[1]["add_prefix_space"]:
        return "smollm"
    return "gpt-2" if kinds == ["ByteLevel"] and not steps[0]["add_prefix_space"] else None


def _tensors(model: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights of the language model under GGUF's names."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.model.language_model.state_dict().items():
        if inner := re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name):
            block = _INNER[inner[2]]
            weight = _interleaved(tensor, heads[block]) if block in heads else tensor
            yield f"blk.{inner[1]}.{block}.weight", weight
        else:
            yield f"{_OUTER[name.removesuffix('.weight')]}.weight", tensor
    if not (config.tie_word_embeddings or model.config.tie_word_embeddings):
        yield "output.weight", model.lm_head.weight


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """The two halves of each head's rows in turns, as llama.cpp rotates them. Shape (rows, columns) as before."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
