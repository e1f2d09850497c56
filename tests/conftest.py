from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("maskft", deadline=None, database=None, derandomize=True, max_examples=60)
settings.load_profile("maskft")


def pytest_configure(config: pytest.Config) -> None:
    # peft 0.21 asks transformers 5.23 for a property under its old name
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
