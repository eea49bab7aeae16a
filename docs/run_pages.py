"""Run every Python block of the site's pages: ``python docs/run_pages.py [page ...]``.

The blocks of a page run in order in one namespace, in an empty working folder. A block of ``text`` right after one of
Python is what that one prints; ``...`` in it stands for anything. What a page needs and does not show stands in a
comment, ``<!-- run`` to ``-->``. A fence of ``python no-run`` is shown only; what it is for has to be said beside it.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
BLOCK = re.compile(
    r"^<!-- run\n(?P<hidden>.*?)^-->$"
    r"|^(?P<fence>`{3,}|:{3,})\{?python\}?(?P<options>[^\n]*)\n(?P<code>.*?)^(?P=fence)$"
    r"(?:\n\n?```text\n(?P<output>.*?)^```$)?",
    flags=re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A piece of code.

    Attributes:
        line: Of the page, where it begins.
        code: The code.
        output: What it should print; None if the page does not say.
    """

    line: int
    code: str
    output: str | None


def blocks_of(text: str) -> Iterator[Block]:
    """Yield what runs of a page.

    Args:
        text: The page.

    Yields:
        Its blocks in order.
    """
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start()) + 2
        if found["hidden"] is not None:
            yield Block(line, found["hidden"], None)
        elif "no-run" not in found["options"]:
            yield Block(line, found["code"], found["output"])


def run_page(path: Path) -> int:
    """Run the blocks of a page.

    Args:
        path: The page.

    Returns:
        How many there are.

    Raises:
        AssertionError: If one prints something else than the page says.
    """
    namespace = {"__name__": "__main__"}
    number = 0
    for block in blocks_of(path.read_text(encoding="utf-8")):
        printed = io.StringIO()
        code = compile(
            "\n" * (block.line - 1) + block.code, str(path), "exec", dont_inherit=True
        )
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        number += 1
        if block.output is not None and not doctest.OutputChecker().check_output(
            block.output,
            printed.getvalue(),
            doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
        ):
            raise AssertionError(
                f"line {block.line} of {path} prints\n{printed.getvalue()}and the page says\n{block.output}"
            )
    return number


def pages() -> list[Path]:
    """Return all pages of the site, by name.

    Returns:
        The paths.
    """
    return sorted(path for path in HERE.rglob("*.md") if "_build" not in path.parts)


def main(arguments: Sequence[str]) -> int:
    """Run pages, and say which do not.

    Args:
        arguments: Paths of pages; all if there is none.

    Returns:
        0 if all run.
    """
    import torch

    failed = 0
    warnings.simplefilter("error")
    for path in [Path(name).resolve() for name in arguments] or pages():
        torch.manual_seed(0)
        before = Path.cwd()
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                number = run_page(path)
                sys.stdout.write(
                    f"{path.relative_to(HERE)}: {number} blocks, {time.perf_counter() - start:.1f} s\n"
                )
            except Exception:  # noqa: BLE001  of whatever kind a page's code raises
                failed += 1
                sys.stderr.write(f"{path} fails:\n{traceback.format_exc()}\n")
            finally:
                os.chdir(before)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
