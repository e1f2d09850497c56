"""Formulas of the pages, written in TeX between dollars, become MathML: browsers draw it without a script.

A hook of MkDocs. It knows the commands that the pages use; another one is a warning, and thus ends a strict build.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("mkdocs.hooks.tex")


def _table(text: str) -> dict[str, str]:
    """ "alpha α beta β" as a dictionary."""
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


GREEK = _table("""
    alpha α beta β gamma γ delta δ epsilon ε varepsilon ε zeta ζ eta η theta θ kappa κ lambda λ mu μ nu ν xi ξ pi π
    rho ρ sigma σ tau τ phi φ varphi φ chi χ psi ψ omega ω Delta Δ Gamma Γ Theta Θ Lambda Λ Sigma Σ Phi Φ Psi Ψ
    Omega Ω ell ℓ infty ∞ partial ∂ nabla ∇ top ⊤ emptyset ∅
""")
OPERATORS = _table("""
    odot ⊙ cdot ⋅ times × otimes ⊗ oplus ⊕ pm ± ge ≥ geq ≥ le ≤ leq ≤ ne ≠ neq ≠ approx ≈ sim ∼ propto ∝ ll ≪ gg ≫
    equiv ≡ to → rightarrow → Rightarrow ⇒ mapsto ↦ cup ∪ cap ∩ subset ⊂ subseteq ⊆ setminus ∖ in ∈ notin ∉ dots …
    ldots … cdots ⋯ mid ∣ circ ∘ forall ∀ exists ∃ ast ∗ bmod mod prime ′ langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋
    lceil ⌈ rceil ⌉ lvert | rvert | lVert ‖ rVert ‖ Vert ‖ vert | lbrace { rbrace } colon : wedge ∧ vee ∨ neg ¬
    star ⋆ bullet ∙ dagger † perp ⊥ parallel ∥ square □ leftarrow ← uparrow ↑ downarrow ↓ leftrightarrow ↔ implies ⟹
    iff ⟺ Leftrightarrow ⇔ prec ≺ preceq ⪯ succ ≻ succeq ⪰ triangleq ≜ oslash ⊘ ominus ⊖ lt < gt >
""")
LARGE = {"sum": "∑", "prod": "∏", "int": "∫", "bigcup": "⋃", "bigcap": "⋂"}
LIMITS = {"max", "min", "arg", "sup", "inf", "lim"}
FUNCTIONS = {"ln", "log", "exp", "tanh", "cos", "sin", "det", "Pr", "sign", "sech", *LIMITS}
SPACES = {",": 0.17, ":": 0.22, ";": 0.28, " ": 0.33, "!": -0.17, "quad": 1, "qquad": 2}
ACCENTS = {"hat": "^", "bar": "‾", "overline": "‾", "tilde": "~", "vec": "→", "dot": "˙"}
STYLES = {"mathrm": "", "text": "", "operatorname": "", "texttt": "monospace", "mathtt": "monospace", "textbf": "bold"}
FENCES = {"cases": ("{", ""), "pmatrix": ("(", ")"), "bmatrix": ("[", "]"), "vmatrix": ("|", "|")}
LETTERS = {"mathcal": 0x1D49C, "mathbb": 0x1D538, "mathbf": 0x1D400}
HOLES = {"𝒝": "ℬ", "𝒠": "ℰ", "𝒡": "ℱ", "𝒣": "ℋ", "𝒤": "ℐ", "𝒧": "ℒ", "𝒨": "ℳ", "𝒭": "ℛ"}
HOLES |= {"𝔺": "ℂ", "𝔿": "ℍ", "𝕅": "ℕ", "𝕇": "ℙ", "𝕈": "ℚ", "𝕉": "ℝ", "𝕑": "ℤ"}
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\s+|.", re.DOTALL)


class UnknownCommand(ValueError):
    """A formula uses what is in none of the tables, or is not complete."""


class _Reader:
    """Tokens of a formula, with the row they are read into."""

    def __init__(self, text: str) -> None:
        self.tokens = [token for token in TOKEN.findall(text) if not token.isspace() or token == "\\ "]
        self.text = text
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def row(self, *ends: str) -> str:
        """Everything up to one of `ends`, which is left unread."""
        parts = []
        while self.peek() and self.peek() not in ends:
            parts.append(self.with_scripts())
        return parts[0] if len(parts) == 1 else f"<mrow>{''.join(parts)}</mrow>"

    def with_scripts(self) -> str:
        limits = self.peek().lstrip("\\") in {*LARGE, *LIMITS}
        base, low, high = self.atom(), "", ""
        while self.peek() in ("_", "^", "'"):
            mark = self.next()
            if mark == "_":
                low = self.argument()
            elif mark == "^":
                high = self.argument()
            else:  # the sign is drawn high in its own place
                base = f'<mrow>{base}<mo lspace="0" rspace="0">′</mo></mrow>'
        if not low and not high:
            return base
        kind = ("munder" if low else "") + ("over" if high else "") if limits else ""
        kind = kind if kind != "over" else "mover"
        kind = kind or "m" + ("sub" if low else "") + ("sup" if high else "")
        return f"<{kind}>{base}{low}{high}</{kind}>"

    def argument(self) -> str:
        """What a command or a script takes: a group, or one sign; of a number its first digit."""
        if self.peek()[:1].isdigit() and len(self.peek()) > 1:
            self.tokens[self.at : self.at + 1] = [self.peek()[0], self.peek()[1:]]
        return self.atom()

    def atom(self) -> str:
        token = self.next()
        if not token:
            raise UnknownCommand(f"an end too early in the formula {self.text!r}")
        if token == "{":
            inside = self.row("}")
            self.next()
            return inside
        if token.startswith("\\"):
            return self.command(token[1:])
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token.isalpha():
            return f"<mi>{token}</mi>"
        return _mo("−" if token == "-" else token)

    def command(self, name: str) -> str:
        if name in GREEK:
            return f"<mi>{GREEK[name]}</mi>"
        if name in FUNCTIONS:
            return f"<mi>{name}</mi>"
        if name in LARGE:
            return f'<mo largeop="true">{LARGE[name]}</mo>'
        if name in OPERATORS:
            return _mo(OPERATORS[name])
        if name in SPACES:
            return f'<mspace width="{SPACES[name]}em"/>'
        if name in STYLES:
            return _text(self.raw(), STYLES[name], name == "operatorname" or name == "mathrm")
        if name in LETTERS:
            letters = [chr(LETTERS[name] + ord(letter) - ord("A")) for letter in self.raw()]
            return f"<mi>{''.join(HOLES.get(letter, letter) for letter in letters)}</mi>"
        if name in ACCENTS:
            return f'<mover accent="true">{self.argument()}<mo>{ACCENTS[name]}</mo></mover>'
        if name in ("frac", "tfrac", "dfrac"):
            fraction = f"<mfrac>{self.argument()}{self.argument()}</mfrac>"
            large = "true" if name == "dfrac" else "false"
            return fraction if name == "frac" else f'<mstyle displaystyle="{large}">{fraction}</mstyle>'
        if name == "sqrt":
            return f"<msqrt>{self.argument()}</msqrt>"
        if name == "left":
            opening, inside = self.delimiter(), self.row("\\right")
            self.next()
            return f"<mrow>{_mo(opening, stretchy=True)}{inside}{_mo(self.delimiter(), stretchy=True)}</mrow>"
        if name in ("big", "Big", "bigl", "bigr", "Bigl", "Bigr"):
            return f'<mo stretchy="true" minsize="1.4em" maxsize="1.4em">{_escaped(self.delimiter())}</mo>'
        if name == "begin":
            return self.table(self.raw())
        if name in "{}_%&#$":
            return _mo(name) if name in "{}%" else _text(name, "", False)
        if name == "|":
            return _mo("‖")
        raise UnknownCommand(f"\\{name} in the formula {self.text!r}")

    def delimiter(self) -> str:
        token = self.next()
        return "" if token == "." else OPERATORS.get(token[1:], token.lstrip("\\"))

    def raw(self) -> str:
        """The letters of a group, or the one that follows, spaces included."""
        start = len("".join(self.tokens[: self.at]))
        if self.next() != "{":
            return self.tokens[self.at - 1]
        while self.next() not in ("}", ""):
            pass
        end = len("".join(self.tokens[: self.at])) - 1
        places = [index for index, letter in enumerate(self.text) if not letter.isspace()]
        return self.text[places[start] + 1 : places[end]].replace("\\_", "_")

    def table(self, kind: str) -> str:
        rows: list[list[str]] = [[]]
        while self.peek() and self.peek() != "\\end":
            rows[-1].append(self.row("&", "\\\\", "\\end"))
            if self.peek() == "&":
                self.next()
            elif self.peek() == "\\\\":
                self.next()
                rows.append([])
        self.next()
        self.raw()
        cells = "".join(f"<mtr>{''.join(f'<mtd>{c}</mtd>' for c in row)}</mtr>" for row in rows if row)
        opening, closing = (_mo(sign, stretchy=True) if sign else "" for sign in FENCES.get(kind, ("", "")))
        align = "left" if kind == "cases" else "center"
        return f'<mrow>{opening}<mtable columnalign="{align}" class="{kind}">{cells}</mtable>{closing}</mrow>'


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)


def _mo(text: str, stretchy: bool = False) -> str:
    if not stretchy and text in "()[]{}|‖":
        return f'<mo stretchy="false">{_escaped(text)}</mo>'
    return f"<mo>{_escaped(text)}</mo>"


def _text(text: str, style: str, name: bool) -> str:
    kind = "mi" if name and len(text) > 1 else "mtext"
    look = f' class="{style}"' if style else ' mathvariant="normal"' if name and len(text) == 1 else ""
    spaced = _escaped(text).replace(" ", "\u00a0") if kind == "mtext" else _escaped(text)
    return f"<{kind}{look}>{spaced}</{kind}>"


def mathml(text: str, display: bool) -> str:
    """The formula as a <math> element.

    Raises:
        UnknownCommand: it uses a command that is in none of the tables.
    """
    kind = ' display="block"' if display else ""
    return f"<math{kind}>{_Reader(text.strip()).row()}</math>"


CODE_OR_FORMULA = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<tick>`+)(?!`).*?(?<!`)(?P=tick)(?!`))"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\d$])",
    re.DOTALL | re.MULTILINE,
)
_found: dict[str, list[str]] = {}


def formulas(markdown: str) -> Iterator[tuple[str, bool]]:
    """(TeX, whether it stands on lines of its own) of every formula of a page, code left out."""
    for match in CODE_OR_FORMULA.finditer(markdown):
        if not match["code"]:
            yield match["display"] or match["inline"], bool(match["display"])


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put a word into the place of each formula, which Markdown leaves alone."""
    found = _found[page.file.src_uri] = []

    def replaced(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        text = match["display"] or match["inline"]
        try:
            found.append(mathml(text, bool(match["display"])))
        except UnknownCommand as error:
            log.warning("%s: %s", page.file.src_uri, error)
            found.append(f"<code>{_escaped(text)}</code>")
        return f"xFORMULAx{len(found) - 1}x"

    return CODE_OR_FORMULA.sub(replaced, markdown)


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Put the formulas back."""
    found = _found.get(page.file.src_uri, [])
    return re.sub(r"xFORMULAx(\d+)x", lambda match: found[int(match[1])], content)
