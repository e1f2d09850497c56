"""Runs of the embedded base that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskft.fingerprint import fingerprint
from maskft.recipe import Recipe, load_recipe
from maskft.training import train

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
SHORT = (
    "training.max_steps=8",
    "training.per_device_train_batch_size=4",
    "training.warmup_steps=4",
    "training.learning_rate=0.02",  # far enough in eight steps for answers to change
    "training.save_strategy=no",
    "training.logging_steps=1",
    "data.limits={train: 64, validation: 8, test: 100}",
)


def short_recipe(*overrides: str) -> Recipe:
    return load_recipe(QUICKSTART, [*SHORT, *overrides])


class FrozenWatch:
    """Hashes every tensor of the base when it is loaded, and again when asked."""

    def __init__(self) -> None:
        self.before = ""
        self.tensors: dict = {}

    def load(self, load_model):
        def wrapped(*args, **kwargs):
            model = load_model(*args, **kwargs)
            self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            self.before = fingerprint(self.tensors)
            return model

        return wrapped

    def after(self) -> str:
        return fingerprint(self.tensors)


@pytest.fixture(scope="session")
def frozen() -> FrozenWatch:
    return FrozenWatch()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, frozen: FrozenWatch) -> Path:
    """A finished run of eight steps with the quick start's gate and targets."""
    import maskft.sharded

    folder = tmp_path_factory.mktemp("runs") / "short"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskft.sharded, "load_model", frozen.load(maskft.sharded.load_model))
        train(short_recipe(), folder)
    return folder
