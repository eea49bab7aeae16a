"""Make the page of all errors and warnings from the package's sources: ``python docs/make_errors.py``.

A plain list, by module: ``conf.py`` calls :func:`write` before every build, so the page cannot go stale.
"""

from __future__ import annotations

import ast
from pathlib import Path

INTRODUCTION = """# Errors and warnings

Every error and warning of the package, made from its sources: `{name}` stands for a value. To find one, search for a
few words of it, without the values.
"""


def text_of(message: ast.expr) -> str:
    """Return a message as it stands in the source, with ``{expression}`` where a value comes in.

    Args:
        message: The expression.

    Returns:
        The text; empty if it is no string.
    """
    if isinstance(message, ast.Constant) and isinstance(message.value, str):
        return message.value
    if not isinstance(message, ast.JoinedStr):
        return ""
    parts = [p.value if isinstance(p, ast.Constant) else f"{{{ast.unparse(p.value)}}}" for p in message.values]  # type: ignore[attr-defined]
    return "".join(map(str, parts))


def messages(source: str) -> list[tuple[str, str]]:
    """Return the messages of a module.

    Args:
        source: Its text.

    Returns:
        Kind and text of each ``raise`` and ``warnings.warn``, in order, each once.
    """
    found: dict[tuple[str, str], None] = {}
    for node in ast.walk(ast.parse(source)):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call) and call.args:
            kind = ast.unparse(call.func)
            warns = kind == "warnings.warn"
            if warns or isinstance(node, ast.Raise) or kind.endswith(("Error", "Warning")):
                text = " ".join(text_of(call.args[0]).split())
                if text:
                    found["UserWarning" if warns else kind, text] = None
    return list(found)


def page(package: Path) -> str:
    """Return the page of a package.

    Args:
        package: Its folder.

    Returns:
        Markdown.
    """
    lines = [INTRODUCTION]
    for path in sorted(package.rglob("*.py")):
        of_module = messages(path.read_text(encoding="utf-8"))
        if of_module:
            lines.append(f"## `{'.'.join(path.relative_to(package.parent).with_suffix('').parts)}`\n")
            lines += [f"**{kind}**\n\n```text\n{text}\n```\n" for kind, text in of_module]
    return "\n".join(lines)


def write(package: Path, path: Path) -> None:
    """Write the page.

    Args:
        package: The package's folder.
        path: Of the page.
    """
    path.write_text(page(package), encoding="utf-8")


if __name__ == "__main__":
    HERE = Path(__file__).resolve().parent
    write(HERE.parent / "torch_gradmatch", HERE / "errors.md")
