"""What `maskft plan` says of bases of 32 and 72 billion parameters on eight GPUs with FSDP2: shapes alone, no weights.

    python benchmarks/plan_large.py [--out benchmarks/plan_large.csv]

One row of 2048 tokens for each GPU, bf16, gradient checkpointing.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from common import append, provenance
from transformers import Qwen2_5_VLConfig

from maskft.plan import plan
from maskft.plan.predict import PARTS
from maskft.recipe import Recipe

RANKS = 8
SHAPES = {
    "Qwen2.5-VL-32B": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
    },
    "Qwen2.5-VL-72B": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}
"""Of the language models, from the published config.json files."""
METHODS = {
    "S-MFT fast": {},
    "S-MFT balanced": {"memory": "balanced"},
    "S-MFT fast, low-rank scores": {"score_layout": "low-rank"},
    "S-MFT fast, middle third of the layers": {"layers": "middle-third"},
}


def write_config(name: str, folder: Path) -> None:
    """The base's config.json."""
    shape = SHAPES[name]
    text = {**shape, "num_key_value_heads": 8, "vocab_size": 152064, "max_position_embeddings": 128000}
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3456,
        "num_heads": 16,
        "out_hidden_size": shape["hidden_size"],
    }
    Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False).save_pretrained(folder)


def recipe(folder: Path, method: dict[str, str]) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"base": str(folder)},
            "method": {"name": "mask", **method},
            "data": {"kind": "easy-vqa"},
            "training": {"per_device_train_batch_size": 1, "max_length": 2048, "gradient_checkpointing": True},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plan_large.csv"))
    arguments = parser.parse_args()
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            write_config(name, folder)
            for method, settings in METHODS.items():
                found = plan(recipe(folder, settings), ranks=RANKS, device="gpu")
                peak = found.rows[0].peak
                row = {
                    **provenance(),
                    "model": name,
                    "parameters": found.parameters,
                    "method": method,
                    "ranks": RANKS,
                    **{part: f"{getattr(peak, part) / 1e9:.1f}" for part in (*PARTS, "total")},
                }
                print(name, method, row["total"], flush=True)
                append(arguments.out, [row])


if __name__ == "__main__":
    main()
