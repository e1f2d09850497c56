"""Draws the pictures of this folder: each gate's value and derivative over the offset.

python docs/gates/plot.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

matplotlib.use("svg")
from matplotlib import pyplot as plt

from maskft.gates import Centered, Gate, Normalized, Soft, Threshold, TopK

SETTINGS: dict[str, list[tuple[str, Gate]]] = {
    "soft": [(f"m₀ = {m0}, T = {t:g}", Soft(m0, t)) for m0, t in ((0.98, 1.0), (0.9, 1.0), (0.98, 2.0))],
    "normalized": [(f"m₀ = {m0}, T = {t:g}", Normalized(m0, t)) for m0, t in ((0.98, 1.0), (0.9, 1.0), (0.98, 2.0))],
    "centered": [(f"T = {t:g}", Centered(t)) for t in (1.0, 0.5, 2.0)],
    "topk": [(f"keep_ratio = {keep}", TopK(keep, magnitude_start=False)) for keep in (0.9, 0.5)],
    "threshold": [(f"m₀ = {m0}", Threshold(m0)) for m0 in (0.98, 0.9)],
}
DERIVATIVE = {"topk": "in its place: sign(S)", "threshold": "in its place: 1"}


def draw(name: str, folder: Path) -> Path:
    """Draw one gate into `folder` and return the picture's path."""
    offsets = torch.linspace(-8, 8, 321)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
    for label, gate in SETTINGS[name]:
        values, slopes = (f(offsets, torch.ones_like(offsets)) for f in (gate.value, gate.derivative))
        left.plot(offsets, values, label=label)
        right.plot(offsets, slopes)
    left.set_title("gate m")
    right.set_title(DERIVATIVE.get(name, "derivative dm/dD"))
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    if name == "threshold":
        right.set_ylim(0, 1.1)
    for axes in (left, right):
        axes.set_xlabel("score S" if name == "topk" else "offset D")
        axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "maskft"  # the same picture is the same file
    for gate in SETTINGS:
        draw(gate, Path(__file__).parent)
