"""How Sphinx builds the site: ``make docs``. Offline, every warning an error."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch_gradmatch  # noqa: E402  of this checkout

project = "torch_gradmatch"
author = "The torch_gradmatch developers"
copyright = "2026, " + author  # noqa: A001  Sphinx's name for it
version = release = torch_gradmatch.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
]
html_theme = "furo"
html_title = "torch_gradmatch"
html_static_path = ["_static"]
templates_path: list[str] = []
exclude_patterns = ["_build", "gallery/*.py", "releasing.md"]
nitpicky = True

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # sphinx_autodoc_typehints puts them into the arguments
always_use_bars_union = True
typehints_fully_qualified = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

TORCH = "https://docs.pytorch.org/docs/stable/generated"


def link_to_torch(app: Any, env: Any, node: Any, contnode: nodes.Element) -> nodes.reference | None:  # noqa: ARG001
    """Link what is torch's to its reference, without its inventory: the site builds offline."""
    target = node.get("reftarget", "")
    if not target.startswith("torch."):
        return None
    return nodes.reference("", "", contnode, internal=False, refuri=f"{TORCH}/{target}.html", reftitle=target)


def setup(app: Any) -> None:
    """Tell Sphinx of the above."""
    app.connect("missing-reference", link_to_torch)
