"""Pages of the site that are files of the repository, with their links made to fit; the viewer.

A page with `source: PATH` in its front matter shows that file. Links of the file to others that are
pages of the site lead to those pages, links to other files of the repository lead to the host.
The site carries the viewer at viewer/ where it was built before: `nox -s viewer docs`.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VIEWER = ROOT / "viewer" / "dist"
HOST = "https://github.com/d3pack/d3pack/blob/main/"
ASKS_HOST = ' data-md-component="source"'  # by it the theme asks the host for stars and forks
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "spec/cli.md": "cli.md",
    "spec/d3m-1.md": "format.md",
    "spec/methods.md": "methods.md",
}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_page_markdown(markdown: str, /, *, page: Any, **_: Any) -> str:
    """Return the text of the file that a page shows, or the page's own text."""
    source = page.meta.get("source")
    if not source:
        return markdown
    text = (ROOT / source).read_text(encoding="utf-8")
    folder = posixpath.dirname(source)

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if not (ROOT / target).exists():
            raise FileNotFoundError(f"{source} links to {match[1]}, which does not exist")
        if target in PAGES:
            target = PAGES[target]
        elif target.startswith("docs/") and target.endswith(".md"):
            target = target.removeprefix("docs/")
        else:
            target = HOST + target
        return target + (match[2] or "")

    return LINK.sub(link, text)


def has_viewer() -> bool:
    """Return whether the viewer was built before the site, which then carries it."""
    return (VIEWER / "index.html").is_file()


def on_post_page(output: str, /, *, page: Any, config: Any, **_: Any) -> str:
    """Return a page whose links to the published viewer lead to that of this site."""
    output = output.replace(ASKS_HOST, "")
    if not has_viewer():
        return output
    here = posixpath.relpath("viewer", posixpath.dirname(page.url) or ".")
    return output.replace(f'href="{config["site_url"]}viewer/', f'href="{here}/')


def on_post_template(output: str, /, **_: Any) -> str:
    """Return a page that is no document, such as 404.html."""
    return output.replace(ASKS_HOST, "")


def on_post_build(*, config: Any, **_: Any) -> None:
    """Put the viewer into the site, where it is built."""
    if has_viewer():
        shutil.copytree(VIEWER, Path(config["site_dir"]) / "viewer", dirs_exist_ok=True)
