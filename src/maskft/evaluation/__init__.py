"""Generated answers, scored: what the tuned model does better than its base.

Names are imported on first use, so that the scorers of the benchmarks start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskft.evaluation.evaluate import answers_name, evaluate_run
    from maskft.evaluation.generation import generate_answers
    from maskft.evaluation.metrics import Accuracy, exact_match, wilson_interval

__all__ = ["Accuracy", "answers_name", "evaluate_run", "exact_match", "generate_answers", "wilson_interval"]

_HOMES = {
    "Accuracy": "metrics",
    "answers_name": "evaluate",
    "evaluate_run": "evaluate",
    "exact_match": "metrics",
    "generate_answers": "generation",
    "wilson_interval": "metrics",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"maskft.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'maskft.evaluation' has no attribute '{name}'")
