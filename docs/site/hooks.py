"""What mkdocs is told beside mkdocs.yml: the generated pages, those of the repository's root, and links out of docs/.

A page of the repository links to files that the site does not have: source, folders, figures. There the link's text
stays, without the link. A link between pages stays a link, and mkdocs finds the broken ones.
"""

import importlib.util
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the root, and which page of the site each is."""

LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


GENERATORS = ("reference_pages", "round_pages", "error_pages")
"""Modules beside this one whose PAGES are made from the code."""


def generated() -> dict[str, Callable[[], str]]:
    """Each page that is made from the code, and what makes it."""
    pages: dict[str, Callable[[], str]] = {}
    for name in GENERATORS:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        pages |= module.PAGES
    return pages


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are no files below docs/."""
    from mkdocs.structure.files import File  # tests of this module need no mkdocs

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=with_links(text, source)))
    for page, make in generated().items():
        files.append(File.generated(config, page, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """The pages that are files below docs/; of the generated ones it is done."""
    if page.file.generated_by:
        return markdown
    return with_links(markdown, f"docs/{page.file.src_uri}")


def with_links(text: str, source: str) -> str:
    """``text`` of the file ``source`` with links as the site has them, outside of fenced blocks."""
    parts, at = [], 0
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(lambda found: _link(found, source), text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, LINK.sub(lambda found: _link(found, source), text[at:])])


def _link(found: "re.Match[str]", source: str) -> str:
    label, target = found[1], found[2]
    if re.match(r"[a-z]+:|#", target):
        return found[0]
    path, mark, anchor = target.partition("#")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if place in PAGES:
        page = PAGES[place]
    elif place.startswith("docs/") and place.endswith((".md", ".png")):
        page = place.removeprefix("docs/")
    else:
        return label
    here = PAGES.get(source, source.removeprefix("docs/"))
    return f"[{label}]({posixpath.relpath(page, posixpath.dirname(here) or '.')}{mark}{anchor})"
