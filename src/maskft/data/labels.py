"""What people said of the pictures in two of Debian's packages.

tuxpaint-stamps-default     /usr/share/tuxpaint/stamps: pictures in folders by kind, each with a caption beside it
openclipart-png, -svg       /usr/share/openclipart: png/ and svg/ with the same names; titles and keywords in the SVG

The packages' files stay theirs: they are read where they are, and nothing of them comes with this library. `source` may
be /, or a folder that such a package was unpacked into (dpkg -x).
"""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from maskft.data.pictures import SERIES, Labelled
from maskft.errors import DataError

STAMPS = "usr/share/tuxpaint/stamps"
CLIPART = "usr/share/openclipart"
_CAPTION = re.compile(r"(?:(a pair of|an?|the|some) )?([a-z][a-z' -]*[a-z])\.?")
_LONE = re.compile(r"[a-z]+\.?")
_TITLE = re.compile(r"[a-z]+(?: [a-z]+){0,2}")
_NO_KIND = ("unsorted", "special")
"""Folders whose pictures have nothing in common."""
_LONGEST_METADATA = 1 << 18


def read_stamps(source: Path) -> list[Labelled]:
    """The stamps below `source` that are PNG files, by name.

    Raises:
        DataError: there are none.
    """
    root = _found(source, STAMPS, "tuxpaint-stamps-default")
    found = []
    for file in sorted(root.rglob("*.png")):
        name = file.relative_to(root).with_suffix("").as_posix()
        if file.name.endswith("_mirror.png") or "/" not in name:
            continue
        told = file.with_suffix(".txt")
        caption = told.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip() if told.exists() else ""
        article, title = _said(caption)
        kind = _KINDS.get(name.split("/")[0], name.split("/")[0])
        words = frozenset(_words(f"{caption} {name}"))
        found.append(Labelled(name, file, kind, title, _phrase(title, article), words))
    if not found:
        raise DataError(f"{root} holds no PNG files. Install or unpack tuxpaint-stamps-default again.")
    return found


def read_clipart(source: Path) -> list[Labelled]:
    """The drawings below `source` that are there as PNG, by name. A title that many share is a series', not theirs.

    Raises:
        DataError: there are none.
    """
    root = _found(source, CLIPART, "openclipart-png and openclipart-svg")
    found = []
    for file in sorted((root / "png").rglob("*.png")):
        name = file.relative_to(root / "png").with_suffix("").as_posix()
        if "/" not in name:
            continue
        title, keywords = _metadata(root / "svg" / f"{name}.svg")
        top = name.split("/")[0]
        known = _words(" ".join([name, *keywords]))
        said = _title(title, known)
        kind = None if top in _NO_KIND else top.replace("_", " ")
        found.append(Labelled(name, file, kind, said, _phrase(said, None), frozenset(known | _words(title))))
    if not found:
        raise DataError(f"{root} holds no PNG files. Install or unpack openclipart-png and openclipart-svg.")
    times = Counter(one.title for one in found)
    return [replace(one, title=None, phrase=None) if times[one.title] > SERIES else one for one in found]


_KINDS = {"naturalforces": "natural forces"}


def _found(source: Path, place: str, package: str) -> Path:
    """The package's folder below `source`, or `source` itself."""
    last = Path(place).name
    for root in (source / place, source):
        if root.is_dir() and (root != source or source.name == last):
            return root
    names = " ".join(package.split(" and "))
    raise DataError(
        f"{source} does not hold {place}. Install the Debian package(s) {package} (apt-get install {names}), or unpack "
        f"them (apt-get download {names}; dpkg -x FILE DIR) and give --source DIR."
    )


def _said(caption: str) -> tuple[str | None, str | None]:
    """Article and name of a caption such as "A brown hen."; (None, None) where it is longer than that."""
    plain = caption.strip().replace("\u2019", "'").lower()
    match = _CAPTION.fullmatch(plain)
    if not match or (match[1] is None and not _LONE.fullmatch(plain)) or len(match[2].split()) > 3:
        return None, None
    return match[1], match[2]


def _phrase(title: str | None, article: str | None) -> str | None:
    """How a question asks for a thing, without its end; an article is chosen by letters where the caption has none."""
    if title is None:
        return None
    if article in ("a", "an", "a pair of"):
        return f"Is there {article} {title}"
    if re.search(r"[^s]s$", title):
        return f"Are there {title}"
    return f"Is there {'an' if title[0] in 'aeiou' else 'a'} {title}"


def _metadata(svg: Path) -> tuple[str, list[str]]:
    """Title and keywords of an SVG file; empty where it has none or is not there."""
    if not svg.is_file():
        return "", []
    with svg.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_LONGEST_METADATA)
    block = re.search(r"<metadata.*?</metadata>", text, re.DOTALL)
    if block is None:
        return "", []
    own = re.sub(r"<cc:Agent.*?</cc:Agent>", "", block[0], flags=re.DOTALL)
    title = re.search(r"<dc:title>([^<]*)</dc:title>", own)
    keywords = [html.unescape(word).strip().lower() for word in re.findall(r"<rdf:li>([^<]*)</rdf:li>", own)]
    useful = [word for word in keywords if word and word != "hash" and not word.startswith(("hash(", "0x", "http"))]
    return html.unescape(title[1]).strip() if title else "", useful


def _title(title: str, known: set[str]) -> str | None:
    """A title of up to three words, all of them among the `known` ones of the file's name and keywords."""
    plain = re.sub(r"\(.*?\)", "", title.lower()).replace("_", " ")
    plain = re.sub(r"\b(?:a|an|the|icon|symbol|clipart)\b|\d+", "", plain)
    plain = " ".join(plain.split())
    if not _TITLE.fullmatch(plain) or not set(_words(plain)) <= known:
        return None
    return plain


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"[^\W\d_]+", text.lower()) if len(word) > 1}
