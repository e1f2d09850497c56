"""Pages of the site that are no files of docs/: the README and its like, sources pages link to, the API, notebooks.

A hook of MkDocs. Links keep the form in which they work on a code host, relative to the file they stand in; here they
are turned to where their targets are on the site.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml", ".sh": "bash"}
CODE_OR_LINK = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<tick>`+)(?!`)[^\n]*?(?<!`)(?P=tick)(?!`)"
    r"|\]\((?!https?:|mailto:|#)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)",
    re.DOTALL | re.MULTILINE,
)
LONGEST_SOURCE = 60_000


def on_config(config: Any) -> Any:
    """Append the pages of docs/ that the navigation leaves out, so that every page can be reached."""
    docs = Path(config.docs_dir)
    listed = set(_pages_of(config.nav))
    written = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    if rest := [page for page in written if page not in listed]:
        config.nav.append({"More": rest})
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that are made."""
    root = Path(config.config_file_path).parent
    made = {page: (root / source).read_text(encoding="utf-8") for source, page in ROOT_PAGES.items()}
    made |= {page: _api_page(root, page) for page in _pages_of(config.nav) if page.startswith("api/")}
    for notebook in Path(config.docs_dir).rglob("*.ipynb"):
        made[_on_site(notebook.relative_to(root).as_posix())] = notebook_page(notebook)
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    texts |= {source: made[page] for source, page in ROOT_PAGES.items()}
    for target in sorted(set(_linked_sources(root, texts))):
        made[_on_site(target)] = _source_page(root, target)
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links to where their targets are on the site."""
    uri = page.file.src_uri
    here = next((source for source, made in ROOT_PAGES.items() if made == uri), f"docs/{uri}")
    return markdown if uri.startswith("source/") else turned(markdown, here, uri)


def turned(markdown: str, source: str, uri: str) -> str:
    """The text with links relative to the page `uri`, where they were relative to the file `source`."""

    def replaced(match: re.Match[str]) -> str:
        if not match["target"]:
            return match[0]
        path = _resolved(source, match["target"])
        if path.endswith(".ipynb") and not match["anchor"] and source.endswith(PurePosixPath(path).stem + ".md"):
            return match[0]  # the page made of a notebook offers the file itself
        target = posixpath.relpath(_on_site(path), posixpath.dirname(uri) or ".")
        return f"]({target}{match['anchor'] or ''})"

    return CODE_OR_LINK.sub(replaced, markdown)


def _pages_of(nav: Any) -> Iterator[str]:
    """Every page that a navigation names."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for inner in nav.values():
            yield from _pages_of(inner)
    else:
        for inner in nav:
            yield from _pages_of(inner)


def _resolved(source: str, target: str) -> str:
    """A link's target as a path from the repository's top."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _on_site(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path.startswith("docs/"):
        return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
    return f"source/{path}.md"


def _linked_sources(root: Path, texts: dict[str, str]) -> Iterator[str]:
    """Files and folders outside docs/ that pages link to, with the files of those folders."""
    for source, text in texts.items():
        for match in CODE_OR_LINK.finditer(text):
            path = _resolved(source, match["target"]) if match["target"] else "docs/"
            if path.startswith(("docs/", "..")) or path in ROOT_PAGES:
                continue
            yield path
            yield from (f"{path}/{inner}" for inner in _inside(root / path))


def _inside(folder: Path) -> list[str]:
    """Files of a folder that can be shown, as paths below it; none for a file."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return [path.relative_to(folder).as_posix() for path in paths if _shown(path)]


def _shown(path: Path) -> bool:
    return path.suffix not in (".safetensors", ".png", ".pyc")


def _source_page(root: Path, target: str) -> str:
    """A file in a block of code, or a folder as a list of links."""
    path, title = root / target, f"# {target}\n\n"
    if path.is_dir():
        name = PurePosixPath(target).name
        return title + "\n".join(f"- [{inner}]({name}/{inner}.md)" for inner in _inside(path)) + "\n"
    text = path.read_text(encoding="utf-8")
    cut = text if len(text) <= LONGEST_SOURCE else text[:LONGEST_SOURCE] + "\n... (shortened)\n"
    return f"{title}````{LANGUAGES.get(path.suffix, 'text')}\n{cut}````\n"


def _api_page(root: Path, uri: str) -> str:
    """Of a module all that is public; of a package what it hands out."""
    module = uri.removeprefix("api/").removesuffix(".md")
    package = root / "src" / module.replace(".", "/") / "__init__.py"
    page = f"# {module}\n\n::: {module}\n"
    if not package.exists():
        return page
    [names] = re.findall(r"^__all__ = (\[.*?\])", package.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    members = [name for name in ast.literal_eval(names) if not name.startswith("_")]
    return f"{page}    options:\n      imported_members: true\n      members: {members}\n"


def notebook_page(path: Path) -> str:
    """A notebook as Markdown, with the outputs it was saved with."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [_cell(cell) for cell in cells]
    title, *rest = parts
    return "\n\n".join([title, f"[Download this notebook]({path.name})", *rest]) + "\n"


def _cell(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    return "\n\n".join([f"```python\n{text}\n```", *filter(None, map(_output, cell["outputs"]))])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return (
            f"![The picture the cell above draws](data:image/png;base64,{''.join(''.join(data['image/png']).split())})"
        )
    if "image/svg+xml" in data:
        return f'<div class="output">{"".join(data["image/svg+xml"])}</div>'
    text = "".join(output.get("text") or data.get("text/plain", ""))
    return f"```text\n{text.rstrip()}\n```" if text else ""
