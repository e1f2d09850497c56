"""Tiny bases on disk, as scripts and recipes load them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.helpers import MARKED, make_processor
from tests.evaluation.tiny import tiny_base
from tests.tuner.models import tiny_llama


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders "llama" and "llava" of models with tokenizer or processor."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = make_processor(MARKED).tokenizer
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    tiny_llama(**sizes, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return [folder / "llama", tiny_base(folder / "llava")]
