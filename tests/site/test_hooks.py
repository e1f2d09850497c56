"""Formulas to MathML, links to where their targets are on the site, notebooks to pages."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tex, pages = hook("tex"), hook("pages")
WRITTEN = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]


@pytest.mark.parametrize("page", WRITTEN, ids=[page.relative_to(ROOT).as_posix() for page in WRITTEN])
def test_every_formula_is_understood(page: Path) -> None:
    for formula, display in tex.formulas(page.read_text(encoding="utf-8")):
        ElementTree.fromstring(tex.mathml(formula, display))


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("x", "<mi>x</mi>"),
        ("W'", '<mrow><mi>W</mi><mo lspace="0" rspace="0">′</mo></mrow>'),
        ("W'^2", '<msup><mrow><mi>W</mi><mo lspace="0" rspace="0">′</mo></mrow><mn>2</mn></msup>'),
        ("m_0", "<msub><mi>m</mi><mn>0</mn></msub>"),
        ("s_{ij}^2", "<msubsup><mi>s</mi><mrow><mi>i</mi><mi>j</mi></mrow><mn>2</mn></msubsup>"),
        (r"\frac{a}{2T}", "<mfrac><mi>a</mi><mrow><mn>2</mn><mi>T</mi></mrow></mfrac>"),
        (r"\sum_i w_i", "<munder>"),
        (r"\max_{i}^{n} w", "<munderover>"),
        (r"\left( x \right.", "<mo>(</mo><mi>x</mi><mo></mo>"),
        (r"\big( x", 'minsize="1.4em"'),
        (r"\text{is among the }", "<mtext>is\u00a0among\u00a0the\u00a0</mtext>"),
        (r"\texttt{keep\_ratio}", '<mtext class="monospace">keep_ratio</mtext>'),
        (r"\mathcal N", "<mi>𝒩</mi>"),
        (r"\mathcal{L}", "<mi>ℒ</mi>"),
        (r"\hat x", '<mover accent="true"><mi>x</mi><mo>^</mo></mover>'),
        (r"\sqrt{2}", "<msqrt><mn>2</mn></msqrt>"),
        (r"\mathrm{logit}", "<mi>logit</mi>"),
        (r"a < b", "<mo>&lt;</mo>"),
        (r"0.5\%", '<mn>0.5</mn><mo>%</mo>'),
        (r"\|x\|", '<mo stretchy="false">‖</mo>'),
        (r"\_", "<mtext>_</mtext>"),
        (r"\tfrac12", '<mstyle displaystyle="false"><mfrac><mn>1</mn><mn>2</mn></mfrac></mstyle>'),
        (r"\begin{pmatrix} 1 & a \end{pmatrix}", '</mtable><mo>)</mo></mrow>'),
        (r"\begin{cases} 1 & a \\ 0 & b \end{cases}", '<mtable columnalign="left" class="cases">'),
    ],
)  # fmt: skip
def test_formula(formula: str, expected: str) -> None:
    made = tex.mathml(formula, False)
    assert expected in made
    ElementTree.fromstring(made)


def test_unknown_command_is_named() -> None:
    with pytest.raises(tex.UnknownCommand, match=r"\\nonsense in the formula"):
        tex.mathml(r"a \nonsense", False)


def test_formula_without_its_end() -> None:
    with pytest.raises(tex.UnknownCommand, match="an end too early"):
        tex.mathml(r"\frac{a}", False)


def test_code_and_money_are_no_formulas() -> None:
    text = "`$HOME` and ``a $b$ ` c``\n```\n$x$\n```\ncosts $5 or $6, but $y$ is one\n"
    assert list(tex.formulas(text)) == [("y", False)]


@pytest.mark.parametrize(
    ("source", "uri", "link", "expected"),
    [
        ("README.md", "index.md", "docs/method.md#backward", "method.md#backward"),
        ("README.md", "index.md", "src/maskft/gates.py", "source/src/maskft/gates.py.md"),
        ("docs/gates/soft.md", "gates/soft.md", "../method.md", "../method.md"),
        ("docs/releasing.md", "releasing.md", "../CHANGELOG.md", "changelog.md"),
        ("docs/log.md", "log.md", "../recipes/distributed", "source/recipes/distributed.md"),
        ("docs/tutorials/index.md", "tutorials/index.md", "quickstart.ipynb", "quickstart.md"),
        ("docs/tutorials/quickstart.md", "tutorials/quickstart.md", "quickstart.ipynb", "quickstart.ipynb"),
        ("docs/a.md", "a.md", "https://arxiv.org/abs/2512.23073", "https://arxiv.org/abs/2512.23073"),
    ],
)
def test_links(source: str, uri: str, link: str, expected: str) -> None:
    assert pages.turned(f"see [it]({link}).", source, uri) == f"see [it]({expected})."
    assert pages.turned(f"`[it]({link})`", source, uri) == f"`[it]({link})`"
    assert pages.turned(f"[`code`]({link})", source, uri) == f"[`code`]({expected})"


def test_notebook_becomes_a_page(tmp_path: Path) -> None:
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["one\n", "two\n"]},
        {"output_type": "display_data", "data": {"image/png": "iVB\nOR\n", "text/plain": "<Figure>"}},
        {"output_type": "display_data", "data": {"image/svg+xml": ["<svg>", "</svg>"]}},
        {"output_type": "execute_result", "data": {"text/plain": ["3"]}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "1 + 2", "outputs": outputs},
    ]
    path = tmp_path / "some.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    page = pages.notebook_page(path)
    assert page.startswith("# Title\ntext\n\n[Download this notebook](some.ipynb)\n\n```python\n1 + 2\n```")
    assert "```text\none\ntwo\n```" in page
    assert "](data:image/png;base64,iVBOR)" in page
    assert re.search(r"<svg></svg></div>\n\n```text\n3\n```", page)
