"""Make the page of all errors and warnings from the package's sources: ``python docs/make_errors.py``.

``conf.py`` calls :func:`write` before every build, so the page cannot go stale. A message that cannot be shown stops
the build. A message is shown as it stands in the source, with ``{name}`` where a value comes in.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

TOPICS = {  # the rooms of the package, in the order of the page
    "optimizer": "The wrapper",
    "methods": "Methods",
    "data": "Data",
    "_checks": "Arguments and losses",
    "gradients": "Gradients and their agreement",
    "slow": "Slow weights and the native operator",
    "wrapper": "Checkpoints, groups and arguments",
    "several": "Several optimizers",
    "parallel": "Several processes",
    "evaluation": "Comparing",
}
INTRODUCTION = """# Errors and warnings

Every error and warning of the package, made from its sources. `{name}` stands for a value. To find one, search for a
few words of it, without the values.
"""
KEYS = {"AttributeError", "IndexError", "KeyError"}  # what they carry may be a name, not a message
SHOWS = {"map", "repr", "shown", "shown_name", "sorted", "str", "tuple"}  # calls that only show their last argument
IMPERATIVE = re.compile(
    r"(add|build|call|clone|compare|do|draw|evaluate|give|here|iterate|keep|leave|list|load|look|lower|make|map|move|pass|"
    r"prefer|put|raise|redistribute|reduce|remove|rename|resume|return|save|set|split|start|step|take|to|train|turn|use|"
    r"wrap|write)\b",
    flags=re.IGNORECASE,
)
ADVISES = re.compile(r"\?$|\bshould\b|\bneeds?\b|\bneeded\b|would do|make them|gradient_alignment\(|^meta_step\(")
STATE_DICT = "load what `state_dict()` returned, whole, around the same parameters and with the same settings."


class UnreadableMessageError(ValueError):
    """A message that cannot be shown: it has no text of its own that can be read off the source."""


class Message(NamedTuple):
    """One ``raise`` or ``warnings.warn``.

    Attributes:
        kind: Class of the exception or of the warning.
        text: The message, with ``{name}`` where a value comes in.
        module: Without the package's name; empty for the package itself.
        function: Where in the module; empty at its top.
        raises: What the docstring there says of this kind, or empty.
        title: What the module is about, in Markdown: the beginning of its docstring, or else its name.
    """

    kind: str
    text: str
    module: str
    function: str
    raises: str
    title: str


# ---------------------------------------------------------------------------------------------------- from the sources


def shown(value: ast.expr) -> str:
    """Return a name for a value in a message.

    Args:
        value: The expression.

    Returns:
        The name without braces.
    """
    if isinstance(value, ast.Attribute):
        if value.attr == "__name__":
            return shown(value.value).replace("type(", "type of ").rstrip(")")
        owner = shown(value.value)
        return value.attr.lstrip("_") if owner in {"self", "self.method"} else f"{owner}.{value.attr.lstrip('_')}"
    if isinstance(value, ast.Call):
        called = value.func.attr if isinstance(value.func, ast.Attribute) else ast.unparse(value.func)
        if value.args and (called in SHOWS or called == "join"):
            return shown(value.args[-1])
        if called == "name_of":
            return "batch"
        if value.args and called == "_kind":
            return f"type of {shown(value.args[0])}"
    if isinstance(value, ast.GeneratorExp | ast.ListComp):
        return shown(value.generators[0].iter)
    return ast.unparse(value).replace("self.", "")


@dataclass
class Reader:
    """Reads the messages of one module.

    Args:
        module: Its name without the package's.
        tree: Its syntax tree.
    """

    module: str
    tree: ast.Module
    _functions: dict[str, ast.FunctionDef] = field(default_factory=dict)
    _constants: dict[str, list[str]] = field(default_factory=dict)  # texts that classes have as attributes

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                self._functions[node.name] = node
            elif isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.Assign) and isinstance(inner.value, ast.Constant):
                        text = inner.value.value
                        if isinstance(text, str) and text:
                            self._constants.setdefault(ast.unparse(inner.targets[0]), []).append(text)

    @property
    def title(self) -> str:
        """The first clause of the module's docstring, or else its name."""
        first = re.match(r"(?::math:`[^`]*`|``[^`]*``|[^:;,.])+", ast.get_docstring(self.tree) or "")
        return marked_down(first[0]) if first else self.module

    def messages(self) -> Iterator[Message]:
        """Yield the messages in the order of the source.

        Yields:
            Each of them.
        """
        yield from self._inside(self.tree, [])

    def _inside(self, node: ast.AST, around: list[ast.ClassDef | ast.FunctionDef]) -> Iterator[Message]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                yield from self._inside(child, [*around, child])
                continue
            if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
                yield from self._raised(child.exc, around)
            elif isinstance(child, ast.Call) and ast.unparse(child.func) == "warnings.warn":
                named = [k.value for k in child.keywords if k.arg == "category"] + child.args[1:]
                kind = ast.unparse(named[0]) if named else "UserWarning"
                yield self._message(kind, self.text(child.args[0], {}), around)
            yield from self._inside(child, around)

    def _raised(self, call: ast.Call, around: list[ast.ClassDef | ast.FunctionDef]) -> Iterator[Message]:
        texts: Mapping[str, str] = {}
        maker = self._maker(call)
        if maker is not None:  # a function that returns the exception
            texts = self._arguments(call, maker, {})
            returned = maker.body[-1]
            if not isinstance(returned, ast.Return) or not isinstance(returned.value, ast.Call):
                raise UnreadableMessageError(f"{self.module}: {maker.name}() should end by returning an exception")
            call = returned.value
        kind = " or ".join(re.findall(r"\b[A-Z]\w*", ast.unparse(call.func)))
        if kind in KEYS and not isinstance(call.args[0], ast.Constant | ast.JoinedStr):
            return
        if call.args:
            text = self.text(call.args[0], texts)
            (name,) = [name for name in self._constants if f"{{{name}}}" in text] or [""]
            for constant in self._constants.get(name, [""]):  # a subclass each
                yield self._message(kind, text.replace(f"{{{name}}}", constant) if name else text, around)

    def _maker(self, call: ast.Call) -> ast.FunctionDef | None:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)
        return self._functions.get(name)

    def _arguments(self, call: ast.Call, maker: ast.FunctionDef, texts: Mapping[str, str]) -> dict[str, str]:
        names = [argument.arg for argument in maker.args.args if argument.arg != "self"]
        return {
            name: self.text(value, texts)
            if isinstance(value, ast.Constant | ast.JoinedStr)
            else texts.get(ast.unparse(value), f"{{{shown(value)}}}")
            for name, value in zip(names, call.args, strict=True)
        }

    def text(self, message: ast.expr, texts: Mapping[str, str]) -> str:
        """Return a message with names where values come in.

        Args:
            message: The expression.
            texts: What stands for the names of arguments, by name.

        Returns:
            The text.

        Raises:
            UnreadableMessageError: If there is no text in it.
        """
        if isinstance(message, ast.Constant) and isinstance(message.value, str):
            return message.value
        if isinstance(message, ast.JoinedStr):
            return "".join(
                str(part.value)
                if isinstance(part, ast.Constant)
                else texts.get(ast.unparse(part.value), f"{{{shown(part.value)}}}")
                for part in message.values
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )
        if isinstance(message, ast.Call) and (maker := self._maker(message)) is not None:
            returned = maker.body[-1]
            if isinstance(returned, ast.Return) and returned.value is not None:
                return self.text(returned.value, self._arguments(message, maker, texts))
        raise UnreadableMessageError(
            f"line {message.lineno} of {self.module or '__init__'}: {ast.unparse(message)} cannot be shown as a "
            "message: write it as a string or an f-string where it is raised, or in a function of this module that "
            "returns it"
        )

    def _message(self, kind: str, text: str, around: list[ast.ClassDef | ast.FunctionDef]) -> Message:
        if not re.search("[a-z]", re.sub(r"\{[^}]*\}", "", text)):
            raise UnreadableMessageError(f"{self.module or '__init__'}: the message {text!r} holds no word of its own")
        where = [owner for owner in around if owner.name not in {"__init__", "__post_init__"}]  # a class says it itself
        says = raises_entry(ast.get_docstring(where[-1]) or "", kind) if where else ""
        return Message(kind, text, self.module, ".".join(owner.name for owner in where), says, self.title)


def raises_entry(docstring: str, kind: str) -> str:
    """Return what a docstring says of an exception.

    Args:
        docstring: In Google's style.
        kind: Class of the exception.

    Returns:
        The entry in Markdown, or empty.
    """
    section = re.search(r"^Raises:\n((?:[ ]+.*\n?|\n)+)", docstring, flags=re.MULTILINE)
    if section is None:
        return ""
    entries = re.split(r"^(\w+): ", textwrap.dedent(section[1]), flags=re.MULTILINE)
    return marked_down(dict(zip(entries[1::2], entries[2::2], strict=True)).get(kind, ""))


def marked_down(text: str) -> str:
    """Return a docstring's text as one line of Markdown.

    Args:
        text: In reStructuredText.

    Returns:
        The line.
    """
    text = re.sub(r":math:`([^`]*)`", r"$\1$", " ".join(text.split()))
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")


# --------------------------------------------------------------------------------------------------------- of a message


def parts_of(text: str) -> tuple[str, str]:
    """Split a message into what is wrong and what to do.

    Args:
        text: The message.

    Returns:
        Both; the second is empty if the message does not say.
    """
    ends = [0]
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "({[") - (character in ")}]")
        if depth == 0 and text[i : i + 2] in {": ", "; ", ". "}:
            ends.append(i + 2)
    for end in ends[1:]:
        if IMPERATIVE.match(text[end:]):
            return text[: end - 2], text[end:]
    for end in ends[1:]:
        if text[end - 2] == ":" and ADVISES.search(text[end:]):
            return text[: end - 2], text[end:]
    if text.endswith(": {advice}"):
        return text.removesuffix(": {advice}"), "do what the end of the message says"
    wanted = re.fullmatch(r"([^ {]+|\{[^ }]*\}|.*?)( should .+?)(?: \(got .*\).*|; .*|: .*)?", text)
    if wanted is not None:
        name = f"`{wanted[1]}`" if re.fullmatch(r"[\w.\[\]{}]+", wanted[1]) and wanted[1][0] != "{" else wanted[1]
        return text, name + wanted[2]
    return text, STATE_DICT if "state dict" in text else ""


def sentence(text: str) -> str:
    """Return a text as a sentence of Markdown, in which nothing but code is marked up.

    Args:
        text: The text; code between backticks.

    Returns:
        The sentence.
    """
    pieces = text.strip().split("`")
    pieces[::2] = [re.sub(r"(\{[^}]*\})", r"`\1`", piece) for piece in pieces[::2]]
    pieces = "`".join(pieces).replace("``", "").split("`")  # two values side by side are one piece of code
    pieces[::2] = [re.sub(r"([*_<>\[\]{}$#\\~])", r"\\\1", piece) for piece in pieces[::2]]
    joined = "`".join(pieces)
    if re.match(r"[a-z]+ ", joined):
        joined = joined[0].upper() + joined[1:]
    return joined if joined.endswith((".", "?")) else f"{joined}."


def slug(text: str) -> str:
    """Return an anchor for a message: its first words.

    Args:
        text: The message.

    Returns:
        Letters, digits and hyphens.
    """
    return "error-" + "-".join(re.findall(r"[a-z0-9]+", re.sub(r"\{[^}]*\}", "", text).lower())[:9])


def entry(message: Message, anchor: str) -> str:
    """Return what the page shows of a message.

    Args:
        message: The message.
        anchor: A name for it on the page.

    Returns:
        Markdown.
    """
    cause, remedy = parts_of(message.text)
    cause = message.raises or cause
    where = ".".join(filter(None, ("torch_gradmatch", message.module, message.function)))
    lines = [f"({anchor})=", "", f"**{message.kind}** in `{where}`", ""]
    # Text in a block of its own: whole words to search for, and wrapped as on a terminal.
    lines += ["```text", *textwrap.wrap(message.text, 110, break_long_words=False), "```", ""]
    lines += [f"- Cause: {sentence(cause)}"]
    if remedy:
        lines += [f"- Remedy: {sentence(remedy)}"]
    return "\n".join([*lines, ""])


# ------------------------------------------------------------------------------------------------------------- the page


def read(package: Path) -> list[Message]:
    """Read all messages of a package.

    Args:
        package: Its folder.

    Returns:
        The messages, by module in the order of the source.
    """
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        found += Reader(module, ast.parse(path.read_text(encoding="utf-8"))).messages()
    return found


def page(messages: list[Message]) -> str:
    """Return the page of some messages.

    Args:
        messages: All of them.

    Returns:
        Markdown.
    """
    rooms = [*TOPICS, *sorted({message.module.partition(".")[0] for message in messages} - set(TOPICS))]
    anchors: dict[str, int] = {}
    lines = [INTRODUCTION]
    for room in rooms:
        here = [message for message in messages if message.module.partition(".")[0] == room]
        if not here:
            continue
        lines.append(f"## {TOPICS.get(room) or room or 'torch_gradmatch'}\n")
        for module in dict.fromkeys(message.module for message in here):
            if module != room:
                lines.append(f"### {next(message.title for message in here if message.module == module)}\n")
            seen = set()
            for message in (message for message in here if message.module == module):
                if message in seen:
                    continue
                seen.add(message)
                anchor = slug(message.text)
                anchors[anchor] = number = anchors.get(anchor, 0) + 1
                lines.append(entry(message, anchor if number == 1 else f"{anchor}-{number}"))
    return "\n".join(lines)


def write(package: Path, path: Path) -> None:
    """Write the page of a package's messages, if it differs from what is there.

    Args:
        package: The package's folder.
        path: Of the page.
    """
    text = page(read(package))
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).parent
    write(here.parent / "torch_gradmatch", here / "errors.md")
