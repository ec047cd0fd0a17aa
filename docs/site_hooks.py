"""What mkdocs builds beside docs/: pages of the repository that lie elsewhere, and the files that pages link to.

Links stay as they are in the repository, so that the same page works there and on the site.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "recipes/README.md": "recipes.md",
    "results/README.md": "results/records.md",
    "model_cards/README.md": "model_cards/README.md",
    "model_cards/onerec-v2-beauty.md": "model_cards/onerec-v2-beauty.md",
    "model_cards/onerec-v2-quickstart.md": "model_cards/onerec-v2-quickstart.md",
    "model_cards/simulated-short-videos.md": "model_cards/simulated-short-videos.md",
}
SOURCES = {uri: source for source, uri in PAGES.items()}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)((?:#[^)]*)?)\)")
LIST = re.compile(r"^(?!\s*(?:[-*] |\d+\. |\||$|#))(.*\S.*)\n(?=(?:- |1\. ))", re.M)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of `PAGES`."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def place(path: Path, files: Any, config: Any) -> str | None:
    """Where the site has a file of the repository, which is added where it is missing; None of what is no file."""
    source = os.path.relpath(path, ROOT)
    if source in PAGES:
        return PAGES[source]
    if path.is_relative_to(DOCS):
        return os.path.relpath(path, DOCS)
    if not path.is_file():
        return None
    uri = f"repository/{source}" + (".txt" if path.suffix in (".md", ".py", ".yaml") else "")
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, content=path.read_bytes()))
    return uri


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site has them. Unlike GitHub, Python-Markdown needs an empty line before a list and takes `a[0][1]`
    for a reference.
    """
    uri = page.file.src_uri
    if uri == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    elif uri.startswith("results/"):  # room for wide tables
        page.meta["hide"] = ["toc"]
    here = (ROOT / SOURCES[uri] if uri in SOURCES else DOCS / uri).parent

    def link(match: re.Match) -> str:
        picture, text, target, anchor = match.groups()
        if re.match(r"[a-z]+:", target):
            return match[0]
        found = place((here / target).resolve(), files, config)
        if found is None:
            return text
        return f"{picture}[{text}]({os.path.relpath(found, os.path.dirname(uri) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.M | re.S)  # code stays as it is
    parts[::2] = [LIST.sub(r"\1\n\n", LINK.sub(link, part)).replace("][", "]\\[") for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """In docstrings, written Hugging Face's way: types lose their backticks, and [`Name`] becomes a link to the name's
    place in the reference.
    """
    if page.file.src_uri.startswith("api/"):
        plain = re.compile(r"\[`|`\]|`|, \*optional\*|, defaults to [^<]*$")
        html = re.sub(r"<code>([^<]*`[^<]*)</code>", lambda match: f"<code>{plain.sub('', match[1])}</code>", html)
    names = {path.rpartition(".")[2]: path for path in documented()}

    def reference(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        code = f"<code>{match[1].lstrip('~')}</code>"
        return f'<autoref optional identifier="{names[name]}">{code}</autoref>' if name in names else code

    return re.sub(r"\[<code>(~?[\w.]+)</code>\]", reference, html)


def documented() -> list[str]:
    """Every name that a page of the reference documents, with its module."""
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((DOCS / "api").glob("*.md")))
    return re.findall(r"^::: (onerec_hf\.\S+)$", pages, re.M)
