"""How Sphinx builds the site: ``make docs``. Offline, every warning an error."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.typing import get_type_hints, stringify_annotation

HERE = Path(__file__).parent
sys.path[:0] = [
    str(HERE),
    str(HERE.parent),
    str(HERE.parent / "examples"),
]  # the last for the gallery

from offline import loads_of_site  # noqa: E402

import torch_gradmatch  # noqa: E402  of this checkout

# sphinx_autodoc_typehints calls a method that a later Sphinx will not have, once for every docstring.
warnings.filterwarnings("ignore", message="'sphinx_autodoc_typehints")

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
# MathJax is served with the site: the one file of that wheel that draws formulas without fonts.
mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
if mathjax is None or mathjax.origin is None:
    raise ImportError(
        "the site needs sphinx-mathjax-offline: pip install -r requirements-dev.txt"
    )
html_static_path = [
    "_static",
    str(Path(mathjax.origin).parent / "static" / "mathjax" / "tex-svg.js"),
]
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}  # its entries load more files
html_css_files = ["look.css"]
templates_path: list[str] = []
exclude_patterns = [
    "_build",
    "gallery/*.py",
    "gallery/GALLERY_HEADER.rst",
    "releasing.md",
]
nitpicky = True

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"  # of properties; sphinx_autodoc_typehints takes arguments and results out of it
autodoc_preserve_defaults = True
autodoc_mock_imports = ["lightning", "transformers"]
toc_object_entries_show_parents = "hide"
always_use_bars_union = True
typehints_fully_qualified = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Running the gallery takes minutes: without GRADMATCH_GALLERY=1 its page says only what is in it.
gallery_is_built = os.environ.get("GRADMATCH_GALLERY") == "1"
if gallery_is_built:
    extensions.append("sphinx_gallery.gen_gallery")
    sphinx_gallery_conf = {
        "examples_dirs": "gallery",
        "gallery_dirs": "auto_gallery",
        "within_subsection_order": "FileNameSortKey",
        "abort_on_example_error": True,
        "download_all_examples": False,
        "min_reported_time": 0,
        "show_memory": False,
        "show_signature": False,
    }
else:
    exclude_patterns += ["auto_gallery", "sg_execution_times.rst"]  # of a build before

typehints_document_rtype_none = False
# Types in signatures that have no page: private ones, as the protocols of labels, and those of objects that the package
# makes and takes by itself.
nitpick_ignore_regex = [("py:class", r"torch_gradmatch\.(\w+\.)*_\w+(\.\w+)*")]
nitpick_ignore = [
    ("py:class", "pandas.DataFrame"),
    ("py:class", "torch_gradmatch.parallel.sharing.Sharing"),
    ("py:class", "torch_gradmatch.parallel.together.Together"),
    ("py:class", "torch_gradmatch.slow.buffers.Buffers"),
    ("py:class", "torch_gradmatch.data.meta_batches.MetaBatches"),
]

# Where others document what signatures name: the site builds offline, so without their inventories.
TORCH = "https://docs.pytorch.org/docs/stable"
TORCH_PAGES = {  # of what begins so; all else has a page of its own under generated/
    "torch.amp": "amp.html",
    "torch.device": "tensor_attributes.html",
    "torch.distributed": "distributed.html",
    "torch.distributed.checkpoint": "distributed.checkpoint.html",
    "torch.distributed.fsdp": "distributed.fsdp.fully_shard.html",
    "torch.distributed.tensor": "distributed.tensor.html",
    "torch.dtype": "tensor_attributes.html",
    "torch.optim.Optimizer": "optim.html",
    "torch.utils.checkpoint": "checkpoint.html",
    "torch.utils.data": "data.html",
}
MODULES = {  # a type hint names the module that defines a class
    "matplotlib.axes._axes": "matplotlib.axes",
    "torch._C": "torch",
    "torch._C._distributed_c10d": "torch.distributed",
    "torch.distributed.distributed_c10d": "torch.distributed",
    "torch.nn.modules.module": "torch.nn",
    "torch.nn.parameter": "torch.nn",
    "torch.optim.optimizer": "torch.optim",
    "torch.utils.data.dataloader": "torch.utils.data",
    "torch.utils.data.dataset": "torch.utils.data",
    "torch.utils.data.sampler": "torch.utils.data",
    # of the package: the module under whose name it is documented
    "torch_gradmatch.gradients.agreement": "torch_gradmatch.agreement",
    "torch_gradmatch.gradients.alignment": "torch_gradmatch.alignment",
    "torch_gradmatch.gradients.functional": "torch_gradmatch.functional",
    "torch_gradmatch.slow.ops": "torch_gradmatch.ops",
}
PYTHON = "https://docs.python.org/3/library"


def address_of(target: str, *, is_module: bool) -> str | None:
    """Return where torch, matplotlib, numpy or Python document a name.

    Args:
        target: The name with its module.
        is_module: Whether it is a module's.

    Returns:
        The address, or None if none of them documents it.
    """
    package = target.partition(".")[0]
    if package == "torch":
        if is_module:
            return f"{TORCH}/{TORCH_PAGES.get(target, target.removeprefix('torch.') + '.html')}"
        if target == "torch.Tensor":
            return f"{TORCH}/tensors.html#torch.Tensor"
        of = max(
            (
                name
                for name in TORCH_PAGES
                if target == name or target.startswith(f"{name}.")
            ),
            key=len,
            default="",
        )
        return (
            f"{TORCH}/{TORCH_PAGES[of]}#{target}"
            if of
            else f"{TORCH}/generated/{target}.html"
        )
    if package == "matplotlib":
        module, _, name = target.rpartition(".")
        place = (
            f"axes/{target}"
            if name == "Axes"
            else module.replace("matplotlib.", "") + "_api"
        )
        return f"https://matplotlib.org/stable/api/{place}.html#{target}"
    if package == "numpy":
        return f"https://numpy.org/doc/stable/reference/generated/{target}.html"
    if target == "Ellipsis":
        return f"{PYTHON}/constants.html#Ellipsis"
    if package in {"collections", "contextlib", "pathlib", "random", "typing"}:
        return f"{PYTHON}/{target.rpartition('.')[0]}.html#{target}"
    return None


def link_elsewhere(
    app: Any, env: Any, node: Any, contnode: nodes.Element
) -> nodes.Element | None:
    """Link what others document to their pages, and what the package has moved to where it is documented."""
    target = node.get("reftarget", "")
    module, _, name = target.rpartition(".")
    while module and module not in MODULES:
        module, _, part = module.rpartition(".")
        name = f"{part}.{name}"
    if module:
        target = f"{MODULES[module]}.{name}"
    if target.startswith("torch_gradmatch.") and target != node["reftarget"]:
        domain = env.get_domain("py")
        found = domain.resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], target, node, contnode
        )
        return found if isinstance(found, nodes.Element) else None
    address = address_of(target, is_module=node.get("reftype") == "mod")
    if address is None:
        return None
    return nodes.reference(
        "", "", contnode, internal=False, refuri=address, reftitle=target
    )


def skip_fields(
    app: Any, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out the fields of named tuples: their class's docstring documents them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


SIGNATURES = {
    "torch_gradmatch.GradMatch.step": "(closure=None)"
}  # the default tells no closure from None


def sign(
    app: Any, what: str, name: str, obj: Any, options: Any, *given: Any
) -> tuple[str, None] | None:
    """Leave the types out of named tuples' signatures, too, and private names."""
    if isinstance(obj, type) and issubclass(obj, tuple) and hasattr(obj, "_fields"):
        return f"({', '.join(obj._fields)})", None
    return (SIGNATURES[name], None) if name in SIGNATURES else None


def add_types(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Write the type of each attribute that a docstring lists beside its name."""
    if what != "class":
        return
    types = get_type_hints(obj.__init__) | get_type_hints(obj)
    for at, line in reversed(list(enumerate(lines))):
        kind = types.get(line.removeprefix(".. attribute:: "))
        if kind is not None and line.startswith(".. attribute:: "):
            lines.insert(at + 1, f"   :type: {stringify_annotation(kind, 'smart')}")


def mark_sizes(app: Any, doctree: nodes.document) -> None:
    """Tell the style sheet which cells of tables stay in one line; let a click show a picture whole."""
    for entry in doctree.findall(nodes.entry):
        entry["classes"].append("short" if len(entry.astext()) <= 28 else "long")
    for image in doctree.findall(nodes.image):
        image.setdefault("width", "100%")  # with it, Sphinx links the file
        image["classes"].append("front" if app.env.docname == "index" else "wide")


def check_offline(app: Any, error: Exception | None) -> None:
    """Refuse a site of which a page loads something from another one."""
    found = (
        loads_of_site(Path(app.outdir))
        if error is None and app.builder.name == "html"
        else {}
    )
    if found:
        raise ExtensionError(f"pages load from elsewhere: {found}")


def add_gallery(app: Any, docname: str, source: list[str]) -> None:
    """Lead from the gallery's page to what was built of it."""
    if docname == "gallery/index" and gallery_is_built:
        source[0] += "\n```{toctree}\n../auto_gallery/index\n```\n"


def setup(app: Any) -> None:
    """Tell Sphinx of the above."""
    app.connect("autodoc-process-docstring", add_types)
    app.connect(
        "autodoc-process-signature", sign, priority=400
    )  # before sphinx_autodoc_typehints
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("build-finished", check_offline)
    app.connect("doctree-read", mark_sizes)
    app.connect("missing-reference", link_elsewhere)
    app.connect("source-read", add_gallery)
