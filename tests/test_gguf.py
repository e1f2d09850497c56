"""A language model written as GGUF and read back is the same one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
)

from maskft.errors import ModelError
from maskft.vlm.embedded import embedded_base
from maskft.vlm.gguf_file import write_gguf
from tests.evaluation.tiny import tiny_base
from tests.test_cli import call

TEXTS = ("what color ?", "  Größe 尺寸\n12345 <|im_start|>user", "red circle<image>yes no")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of two heads with one pair of keys and values, an output head of its own."""
    return tiny_base(tmp_path_factory.mktemp("gguf") / "base")


def read_back(path: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    return model.eval()


def rounded(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The folder's model with the matrices of its language model and head rounded."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    for part in (model.model.language_model, model.lm_head):
        for weight in part.parameters():
            weight.data = weight.data.to(dtype).float() if weight.ndim > 1 else weight.data
    return model


def logits(model: nn.Module, size: int) -> Tensor:
    ids = torch.randint(0, size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("f16", torch.float16), ("f32", torch.float32)])
def test_the_language_model_comes_back(dtype: str, torch_dtype: torch.dtype, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "language.gguf"
    written = write_gguf(base, out, dtype=dtype)
    assert (written.tensors, written.bytes) == (21, out.stat().st_size)
    model, expected = read_back(out), rounded(base, torch_dtype)
    size = expected.config.text_config.vocab_size
    assert torch.equal(logits(model, size), logits(expected, size))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out).tensors}
    assert kinds["blk.1.attn_q.weight"] == kinds["output.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert [path.name for path in tmp_path.iterdir()] == ["language.gguf"]


def test_the_tokenizer_comes_back(base: Path, tmp_path: Path) -> None:
    write_gguf(base, tmp_path / "language.gguf")
    processor = AutoProcessor.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="language.gguf")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == processor.tokenizer(text)["input_ids"]
    fields = GGUFReader(tmp_path / "language.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.chat_template"].contents() == processor.chat_template
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert {kinds[i] for i in processor.tokenizer.all_special_ids} == {3}
    assert set(kinds) == {1, 3}


def test_a_tied_head_is_written_once(base: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    AutoProcessor.from_pretrained(base).save_pretrained(tmp_path / "tied")
    out = tmp_path / "out" / "language.gguf"
    out.parent.mkdir()
    assert write_gguf(tmp_path / "tied", out, dtype="f32").tensors == 20
    assert torch.equal(logits(read_back(out), 300), logits(rounded(tmp_path / "tied", torch.float32), 300))


@pytest.mark.slow
def test_the_embedded_base(tmp_path: Path) -> None:
    """Its digits are split as its tokenizer does, and 135M weights in bf16 round to f16 as expected."""
    out = tmp_path / "language.gguf"
    write_gguf(embedded_base(), out)
    assert torch.equal(logits(read_back(out), 49152), logits(rounded(embedded_base(), torch.float16), 49152))


def with_changes(base: Path, folder: Path, name: str, **changes: object) -> Path:
    """A copy of a folder whose JSON file is changed; keys with dots lie in sections."""
    shutil.copytree(base, folder)
    content = json.loads((folder / name).read_text())
    for key, value in changes.items():
        *sections, last = key.split("__")
        inner = content
        for section in sections:
            inner = inner[section]
        inner[last] = value
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("config.json", {"text_config__model_type": "mistral"}, "its language model is of the type 'mistral'"),
        ("config.json", {"text_config__attention_bias": True}, "attention or feed-forward layers have biases"),
        (
            "config.json",
            {"text_config__rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            "its positions are of the kind 'linear'",
        ),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "its tokenizer is no known byte-level BPE"),
        ("config.json", {"model_type": "llama"}, "as an image-text-to-text model"),
    ],
)
def test_what_cannot_be_written_is_refused(
    name: str, changes: dict[str, object], expected: str, base: Path, tmp_path: Path
) -> None:
    folder = with_changes(base, tmp_path / "changed", name, **changes)
    with pytest.raises(ModelError, match=expected):
        write_gguf(folder, tmp_path / "language.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]


def test_digits_one_by_one_have_a_name(base: Path, tmp_path: Path) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    rest = json.loads((base / "tokenizer.json").read_text())["pre_tokenizer"]
    both = {"type": "Sequence", "pretokenizers": [digits, rest]}
    folder = with_changes(base, tmp_path / "digits", "tokenizer.json", pre_tokenizer=both)
    write_gguf(folder, tmp_path / "language.gguf")
    assert GGUFReader(tmp_path / "language.gguf").fields["tokenizer.ggml.pre"].contents() == "smollm"


def test_a_weight_beyond_f16_is_refused(base: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(base)
    model.lm_head.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    AutoProcessor.from_pretrained(base).save_pretrained(tmp_path / "large")
    with pytest.raises(ModelError, match=r"'output.weight' holds values that f16 cannot. Write f32."):
        write_gguf(tmp_path / "large", tmp_path / "language.gguf")
    write_gguf(tmp_path / "large", tmp_path / "language.gguf", dtype="f32")


def test_the_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "language.gguf"
    assert call(monkeypatch, "gguf", base, out, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "model": str(base),
        "gguf": str(out),
        "dtype": "f16",
        "tensors": 21,
        "bytes": out.stat().st_size,
    }
    for arguments, expected in (
        ((base, out), f"{out} exists"),
        ((tmp_path / "nowhere", tmp_path / "b.gguf"), "as an image-text-to-text model"),
        ((base, tmp_path / "b.gguf", "--dtype", "q4"), "dtype is 'q4'; it must be one of f16, f32"),
    ):
        assert call(monkeypatch, "gguf", *arguments) == 2
        assert expected in capsys.readouterr().err
    monkeypatch.setattr("maskft.vlm.gguf_file.find_spec", lambda name: None)
    assert call(monkeypatch, "gguf", base, tmp_path / "b.gguf") == 2
    assert "pip install 'maskft[demo]'" in capsys.readouterr().err
