"""The playground as a web page, by gradio: an image, a question, and the answers of base and masks side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maskft.app.playground import BASE, MIXTURE, Playground
from maskft.errors import MissingExtraError, UserError
from maskft.report.figures import heat
from maskft.report.gather import gather
from maskft.runs import RECIPE

INSTALL = "pip install 'maskft[app]'"
MOST_BYTES = "8mb"
"""Of an uploaded file."""
WAITING = 16
"""Questions that may wait; further ones are told to come back."""
EXAMPLES = 6
STYLE = """
.heat svg { width: 100%; max-width: 44rem; height: auto; }
.heat svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
"""


_CONTRAST = {
    "body_text_color_subdued": {"": "#57606a", "_dark": "#9ea7b3"},
    "button_primary_background_fill": {"": "#0550ae", "_dark": "#0550ae"},
    "button_primary_background_fill_hover": {"": "#033d8b", "_dark": "#033d8b"},
    "button_primary_text_color": {"": "#ffffff", "_dark": "#ffffff"},
}
"""Colours of gradio's theme, light and dark, in whose place stand some that can be read."""


def library() -> Any:
    """gradio, with its statistics off.

    Raises:
        MissingExtraError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError("gradio", INSTALL, "the playground") from error
    return gradio


def build(playground: Playground) -> Any:
    """The page, not yet served."""
    gr = library()
    with gr.Blocks(title="maskft playground", analytics_enabled=False) as page:
        gr.Markdown("# maskft playground\nAsk about an image: the base and every mask answer.")
        with gr.Row():
            with gr.Column():
                # without a mode, gradio hands the file on and does not decode it
                image = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Image",
                    elem_id="image",
                    height=280,
                )
                question = gr.Textbox(label="Question", lines=2, elem_id="question")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
                chosen = gr.CheckboxGroup(playground.names, value=playground.names, label="Masks", elem_id="masks")
                strength = gr.Slider(
                    0, 1, value=1, step=0.05, label="Strength: 0 is the base, 1 the mask", elem_id="strength"
                )
                with gr.Accordion("Layers where masks work", open=False):
                    on = gr.CheckboxGroup(
                        playground.places, value=playground.places, show_label=False, label="Layers", elem_id="layers"
                    )
            with gr.Column():
                boxes = {
                    name: gr.Textbox(label=name, lines=2, interactive=False, elem_id=f"answer-{number}")
                    for number, name in enumerate((BASE, *playground.names))
                }
                boxes[MIXTURE] = gr.Textbox(
                    label=MIXTURE, lines=2, interactive=False, visible=False, elem_id="answer-mixture"
                )
        if found := _examples(playground):
            gr.Examples(found, [image, question], label="From the test set", cache_examples=False)
        controls = [image, question, chosen, strength, on]
        for event in (ask.click, question.submit):
            event(_asked(gr, playground, list(boxes)), controls, list(boxes.values()), concurrency_id="model")
        if len(playground.names) > 1:
            _mixing(gr, playground, chosen, boxes[MIXTURE])
        for name, chart in _heats(playground).items():
            with gr.Accordion(f"Where {name} moved", open=False):
                gr.HTML(chart, elem_classes="heat")
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    return page


def serve(page: Any, *, host: str, port: int | None, wait: bool = True) -> str:
    """Serve the page; returns its address once it answers, or with `wait` when it is stopped."""
    gr = library()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # none from a network
    theme = gr.themes.Default(primary_hue="blue", **fonts)
    theme = theme.set(
        **{f"{name}{dark}": value for name, values in _CONTRAST.items() for dark, value in values.items()}
    )
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MOST_BYTES,
        prevent_thread_lock=not wait,
        theme=theme,
        css=STYLE,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
    )
    return str(address)


def _asked(gr: Any, playground: Playground, names: Sequence[str]) -> Any:
    """The handler of a question: a text for each answer box, again and again."""

    def ask(image: str | None, question: str, chosen: list[str], strength: float, on: list[str]) -> Iterator[list[str]]:
        try:
            for said in playground.answers(image, question, chosen, strength, on):
                yield [said.get(name, "") for name in names]
        except UserError as error:
            raise gr.Error(str(error)) from error

    return ask


def _mixing(gr: Any, playground: Playground, chosen: Any, box: Any) -> None:
    """Controls for a mixture of two masks."""
    names = list(playground.folders)

    def mix(operation: str, first: str, second: str, share: float) -> tuple[str, Any, Any]:
        try:
            told = playground.mix(operation, first, second, share)
        except UserError as error:
            raise gr.Error(str(error)) from error
        return told, gr.update(choices=playground.names, value=playground.names), gr.update(visible=True, value="")

    with gr.Accordion("Mix two masks", open=False), gr.Row():
        operation = gr.Dropdown(
            ["interpolate", "product", "union", "intersection"], value="interpolate", label="Operation"
        )
        first = gr.Dropdown(names, value=names[0], label="First")
        second = gr.Dropdown(names, value=names[1], label="Second")
        share = gr.Slider(0, 1, value=0.5, step=0.05, label="Share of the second, for interpolate")
        button = gr.Button("Mix", elem_id="mix")
        told = gr.Textbox(label="Mixture", interactive=False, elem_id="mixture")
        button.click(mix, [operation, first, second, share], [told, chosen, box], concurrency_id="model")


def _heats(playground: Playground) -> dict[str, str]:
    """Heat maps of the masks that come from runs, by name."""
    runs = {name: folder for name, folder in playground.folders.items() if (folder / RECIPE).is_file()}
    views = gather(list(runs.values())) if runs else []
    figures = {name: heat(view) for name, view in zip(runs, views, strict=True)}
    return {name: str(figure.chart) for name, figure in figures.items() if figure is not None}


def _examples(playground: Playground) -> list[list[str]]:
    """Images and questions of the first run that has answered its test questions."""
    for folder in playground.folders.values():
        path = folder / "answers-test.jsonl"
        if not path.is_file():
            continue
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        there = [r for r in records if r.get("image") and Path(r["image"]).is_file()]
        step = max(1, len(there) // EXAMPLES)
        return [[r["image"], r["question"]] for r in there[::step][:EXAMPLES]]
    return []
