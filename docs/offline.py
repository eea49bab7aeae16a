"""What a page of the site would load from elsewhere: nothing, or it could not be read without a network."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

LOADED_BY = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "object": "data",
    "script": "src",
} | {
    "link": "href",
    "source": "src",
    "video": "src",
}
ONLY_NAMED = {
    "author",
    "canonical",
    "help",
    "license",
    "next",
    "prev",
}  # relations of a link that load nothing
STYLE = re.compile(r"""(?:url\(|@import\s)\s*["']?((?:https?:)?//[^"')\s]+)""")


class _Loaded(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        address = of.get(LOADED_BY.get(tag, "")) or ""
        if (
            address.startswith(("http:", "https:", "//"))
            and of.get("rel") not in ONLY_NAMED
        ):
            self.found.append(address)


def loads(text: str) -> list[str]:
    """Return the addresses at other sites that a page or a style sheet loads; links to follow are none of them."""
    parser = _Loaded()
    parser.feed(text)
    return parser.found + STYLE.findall(text)


def loads_of_site(folder: Path) -> dict[str, list[str]]:
    """Return the same for every file of a built site that loads any."""
    files = sorted([*folder.rglob("*.html"), *folder.rglob("*.css")])
    found = {
        path.relative_to(folder).as_posix(): loads(path.read_text(encoding="utf-8"))
        for path in files
    }
    return {name: addresses for name, addresses in found.items() if addresses}
