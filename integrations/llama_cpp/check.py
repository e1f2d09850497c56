"""A GGUF file of ours in llama.cpp itself: python integrations/llama_cpp/check.py

Writes the language model of the embedded base, or of an exported folder given as argument, and asks llama.cpp (through
the package xllamacpp) and Transformers for tokens, the first token's probabilities and greedy continuations.
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoModelForImageTextToText, AutoProcessor

from maskft.vlm.embedded import embedded_base
from maskft.vlm.gguf_file import write_gguf

PROMPTS = (
    "The capital of France is",
    "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n",
    "In 2024 there were 366 days; 12345 + 1 =",
    "Größe und Maß, 尺寸:",
)
LENGTH = 24


def post(address: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else embedded_base()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "language.gguf"
        size = write_gguf(folder, path).bytes
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = 1024
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        server = xllamacpp.Server(settings)
        largest, alike = 0.0, 0
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            theirs = post(server.listening_address, "/tokenize", content=prompt, parse_special=True)["tokens"]
            assert theirs == ids, (prompt, theirs, ids)
            asked = {"prompt": ids, "n_predict": LENGTH, "temperature": 0, "n_probs": 20, "return_tokens": True}
            answer = post(server.listening_address, "/completion", **asked)
            with torch.inference_mode():
                inputs = torch.tensor([ids])
                ours = model(input_ids=inputs).logits[0, -1].log_softmax(-1)
                said = model.generate(
                    inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=LENGTH, do_sample=False
                )
            for entry in answer["completion_probabilities"][0]["top_logprobs"]:
                largest = max(largest, abs(entry["logprob"] - ours[entry["id"]].item()))
            tokens = [i for i in said[0, len(ids) :].tolist() if i != tokenizer.eos_token_id]
            alike += answer["tokens"][: len(tokens)] == tokens
            sys.stdout.write(f"{prompt!r}: {answer['content']!r}\n")
    sys.stdout.write(
        f"{size / 1e6:.1f} MB; tokens alike; largest difference of the 20 likeliest tokens' log-probabilities "
        f"{largest:.2g}; {alike} of {len(PROMPTS)} greedy continuations of {LENGTH} tokens alike\n"
        f"xllamacpp {version('xllamacpp')}, transformers {version('transformers')}, torch {version('torch')}\n"
    )


if __name__ == "__main__":
    main()
