"""Generated answers, scored: what the tuned model does better than its base."""

from maskft.evaluation.evaluate import evaluate_run
from maskft.evaluation.generation import generate_answers
from maskft.evaluation.metrics import Accuracy, exact_match, wilson_interval

__all__ = ["Accuracy", "evaluate_run", "exact_match", "generate_answers", "wilson_interval"]
