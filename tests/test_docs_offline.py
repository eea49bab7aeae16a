"""What checks that no page of the site loads anything from elsewhere finds what does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline", DOCS / "offline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "text",
    [
        '<script defer="defer" src="https://cdn.example/mathjax.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/style.css" />',
        '<p><img alt="" src="http://cdn.example/badge.svg"></p>',
        "<style>@import 'https://cdn.example/font.css';</style>",
        "<style>a { background: url(https://cdn.example/a.png) }</style>",
    ],
)
def test_what_loads_from_elsewhere_is_found(text: str, offline: ModuleType):
    assert [address.partition("//")[2].partition("/")[0] for address in offline.loads(text)] == ["cdn.example"]


@pytest.mark.parametrize(
    "text",
    [
        '<a href="https://example.org/">a link to follow</a>',
        '<link rel="next" href="https://example.org/next.html">',
        '<script src="_static/tex-svg.js"></script><img src="../_images/a.png"><script>"https://example.org"</script>',
        "a { background: url(data:image/png;base64,AAAA) }",
    ],
)
def test_what_loads_nothing_from_elsewhere_is_not(text: str, offline: ModuleType):
    assert offline.loads(text) == []


def test_the_files_of_a_site_that_load_are_named(offline: ModuleType, tmp_path: Path):
    (tmp_path / "guides").mkdir()
    (tmp_path / "index.html").write_text("<p>nothing</p>")
    (tmp_path / "guides" / "page.html").write_text('<script src="https://cdn.example/a.js"></script>')
    assert offline.loads_of_site(tmp_path) == {"guides/page.html": ["https://cdn.example/a.js"]}
