from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "maskft",
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine draws slowly
)
settings.load_profile("maskft")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file share a process, so that fixtures are made once; those that share the embedded base, one too.
    Some name a group of their own."""
    for item in items:
        if item.get_closest_marker("xdist_group") is not None:
            continue
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder in ("embedded", "distributed") else item.path.stem))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
