"""An exported model is served by `transformers serve` in a process of its own and asked by the openai client."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import BadRequestError, OpenAI
from transformers import AutoModelForImageTextToText, AutoProcessor

from maskft.adapters.export import export_merged
from maskft.tuner import attach_saved
from maskft.vlm.embedded import embedded_base
from tests.data.helpers import png
from tests.evaluation.tiny import tiny_adapter, tiny_base

TOKENS = 12
COLOURS = ("red", "blue", "lime")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged tiny LLaVA, its base beside it."""
    folder = tmp_path_factory.mktemp("served")
    base, adapter = tiny_base(folder / "base"), tiny_adapter(folder / "base", folder / "adapter")
    model = attach_saved(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()
    processor = AutoProcessor.from_pretrained(base)
    for colour in COLOURS:
        png(folder / f"{colour}.png", colour, size=(28, 28))
    messages = question(str(folder / "red.png"), local=True)
    probe = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    assert export_merged(model, processor, folder / "merged", probe=probe).difference == 0
    return folder / "merged"


@pytest.fixture(scope="module")
def client(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with serving(exported, tmp_path_factory.mktemp("hub")) as client:
        yield client


@contextlib.contextmanager
def serving(folder: Path, cache: Path) -> Iterator[OpenAI]:
    """A client of a server on a free port of this machine, offline and with an empty hub cache."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder)]
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    log = cache / "server.log"
    with log.open("w") as to:
        server = subprocess.Popen([*command, *options], env={**os.environ, **hub}, stdout=to, stderr=to)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
    finally:
        server.terminate()
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    """Until the server answers; what it logged is the error otherwise."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-4000:])


def question(image: str, text: str = "what color ?", *, local: bool = False) -> list[dict[str, Any]]:
    """One user turn, as the client sends it, or as a processor takes it."""
    picture = {"type": "image", "url": image} if local else {"type": "image_url", "image_url": {"url": image}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def greedy(folder: Path, image: Path, text: str = "what color ?") -> str:
    """What the model says when it is called in this process."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()  # as the server does
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        question(str(image), text, local=True),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    said: str = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def ask(client: OpenAI, model: Path, image: Path, text: str = "what color ?", **more: Any) -> Any:
    return client.chat.completions.create(
        model=str(model), messages=question(data_url(image), text), temperature=0, max_tokens=TOKENS, **more
    )


def test_the_server_answers_as_the_model_does(client: OpenAI, exported: Path) -> None:
    served, here, base = {}, {}, {}
    for colour in COLOURS:
        image = exported.parent / f"{colour}.png"
        answer = ask(client, exported, image)
        served[colour] = answer.choices[0].message.content
        here[colour], base[colour] = greedy(exported, image), greedy(exported.parent / "base", image)
        assert answer.usage.completion_tokens <= TOKENS
    assert served == here
    assert len(set(served.values())) > 1  # the image is seen
    assert served != base  # and so is the mask


def test_streaming(client: OpenAI, exported: Path) -> None:
    image = exported.parent / "blue.png"
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, exported, image, stream=True)]
    assert len(pieces) > 2
    assert "".join(pieces) == greedy(exported, image)


def test_another_model_is_refused(client: OpenAI, exported: Path) -> None:
    """The server is pinned to the folder it was started with, by the name it was given."""
    with pytest.raises(BadRequestError) as error:
        ask(client, exported.parent / "base", exported.parent / "red.png")
    assert f"Server is pinned to '{exported}'" in error.value.response.text


def test_the_list_of_models_is_that_of_the_hub_cache(client: OpenAI) -> None:
    """So the folder served is not in it, which clients that ask for the list must know."""
    assert list(client.models.list()) == []


@pytest.mark.slow
def test_the_embedded_base_is_served(tmp_path: Path) -> None:
    """A model whose answers are words, in bf16."""
    asked = "Describe the image."
    picture = png(tmp_path / "red.png", "red", size=(64, 64))
    with serving(embedded_base(), tmp_path) as client:
        said = ask(client, embedded_base(), picture, asked).choices[0].message.content
    assert said == greedy(embedded_base(), picture, asked)
    assert said.isascii()
    assert " " in said.strip()
