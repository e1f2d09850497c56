"""Uncertainty by resampling, and the exact paired test. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_CELLS = 1 << 21  # group draws held at once


def bootstrap_interval(runs: Sequence[Sequence[float]], groups: Sequence[str] | None = None) -> tuple[float, float]:
    """95 % percentile interval of the mean of scores in [0, 1], from 10,000 resamples with a fixed seed.

    Each resample draws groups with replacement, and runs too where there are several.

    Args:
        runs: scores, runs x examples.
        groups: name of each example's group, such as its image; a group is drawn with all its examples, and the order
            of examples doesn't matter. None draws the examples of a single run.

    Returns:
        (low, high); (0, 1) where there are fewer than two groups, because one says nothing about others.
    """
    if groups is None:
        (scores,) = runs
        runs, groups = [sorted(scores)], [f"{number:012d}" for number in range(len(scores))]
    if len(set(groups)) < 2:
        return 0.0, 1.0
    draw = np.random.default_rng(0)
    return _percentiles(_mean_of_drawn(_group_means(runs, groups, draw), draw))


def difference_interval(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], groups: Sequence[str]
) -> tuple[float, float]:
    """Interval of mean(b) - mean(a) on the same examples, as `bootstrap_interval`.

    Each resample draws the same groups for both sides, and runs for each side by itself.

    Args:
        a, b: scores in [0, 1], runs x examples.
        groups: name of each example's group.

    Returns:
        (low, high); (-1, 1) where there are fewer than two groups.
    """
    if len(set(groups)) < 2:
        return -1.0, 1.0
    draw = np.random.default_rng(0)
    means = _group_means([*a, *b], groups, draw)
    return _percentiles(_mean_of_drawn(means[len(a) :], draw) - _mean_of_drawn(means[: len(a)], draw))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of McNemar's test: the binomial test of the discordant pairs against one half.

    Args:
        only_a, only_b: examples that one side alone has right.
    """
    pairs, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return 1.0
    log_largest = math.lgamma(pairs + 1) - math.lgamma(fewer + 1) - math.lgamma(pairs - fewer + 1)
    total = term = 1.0
    for successes in range(fewer, 0, -1):  # from C(n, k) down, in units of it
        term *= successes / (pairs - successes + 1)
        total += term
        if term < 1e-18:
            break
    return min(1.0, 2 * total * math.exp(log_largest - pairs * math.log(2)))


def _group_means(
    runs: Sequence[Sequence[float]], groups: Sequence[str], draw: np.random.Generator
) -> NDArray[np.float64]:
    """Mean over the examples of drawn groups, runs x RESAMPLES. Groups are ordered by name."""
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    sizes = np.bincount(member)
    sums = np.stack([np.bincount(member, weights=np.asarray(scores, dtype=np.float64)) for scores in runs])
    means = np.empty((len(runs), RESAMPLES))
    step = max(1, _CELLS // len(sizes))
    for start in range(0, RESAMPLES, step):
        drawn = draw.integers(0, len(sizes), (min(step, RESAMPLES - start), len(sizes)))
        examples = sizes[drawn].sum(1)
        for run in range(len(runs)):
            means[run, start : start + step] = sums[run][drawn].sum(1) / examples
    return means


def _mean_of_drawn(means: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    """Mean over as many drawn runs as there are, for each resample. `means` is runs x RESAMPLES."""
    runs = len(means)
    drawn = draw.integers(0, runs, (runs, RESAMPLES))
    result: NDArray[np.float64] = np.take_along_axis(means, drawn, axis=0).mean(0)
    return result


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
