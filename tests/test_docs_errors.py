"""The page of errors holds every error of the package, as it stands in the source."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import make_errors  # noqa: E402

PACKAGE = ROOT / "torch_gradmatch"
MESSAGES = make_errors.read(PACKAGE)


def in_package(folder: Path, source: str, name: str = "data/made_up.py") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(textwrap.dedent(source), encoding="utf-8")
    return folder


ONE = '''
    def check(number):
        """Look at it.

        Raises:
            TypeError: If it is none.
            ValueError: If it is *too large* for
                ``limit``, as :func:`~made_up.check` says.
        """
        if number > 2:
            raise ValueError(f"number is {number!r}, of {type(number).__name__}: pass 2 or less")
'''
RENDERED = """\
# Errors and warnings

Every error and warning of the package, made from its sources. `{name}` stands for a value. To find one, search for a
few words of it, without the values.

## Data

### data.made_up

(error-number-is-of-pass-2-or-less)=

**ValueError** in `torch_gradmatch.data.made_up.check`

```text
number is {number}, of {type of number}: pass 2 or less
```

- Cause: If it is \\*too large\\* for `limit`, as `check` says.
- Remedy: Pass 2 or less.
"""


def test_a_module_with_one_raise_is_rendered_exactly(tmp_path: Path):
    make_errors.write(in_package(tmp_path / "package", ONE), tmp_path / "errors.md")
    assert (tmp_path / "errors.md").read_text(encoding="utf-8") == RENDERED


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Fish: with first derivatives.", "Fish"),
        ("How ``torch.distributed`` is seen, and more.", "How `torch.distributed` is seen"),
        ("The product :math:`Hv, w` of\n    one loss.", "The product $Hv, w$ of one loss"),
        ("``compare``: what it costs", "`compare`"),
    ],
)
def test_a_module_is_headed_by_what_it_is_about(tmp_path: Path, docstring: str, expected: str):
    source = f'r"""{docstring}"""\nraise ValueError("this is refused")\n'
    (found,) = make_errors.read(in_package(tmp_path, source))
    assert found.title == expected
    assert f"\n### {expected}\n" in make_errors.page([found])


def test_every_raise_of_the_package_is_on_the_page():
    """Counted in another way: by the text that is sure to be in the message, of whatever is raised by name."""
    page = " ".join(make_errors.page(MESSAGES).split())
    looked_at = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not (
                isinstance(node, ast.Raise) or ast.unparse(call.func) == "warnings.warn"
            ):
                continue
            strings = [
                part.value
                for argument in call.args[:1]
                for part in ast.walk(argument)
                if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value.strip()
            ]
            looked_at += bool(strings)
            literal = max(strings, key=len, default="")
            if "{" not in literal and not literal.isspace():
                assert " ".join(literal.split()) in page, f"{path}:{node.lineno}"
    assert looked_at > 200


def test_every_message_is_shown_with_a_cause_and_an_anchor_of_its_own():
    page = make_errors.page(MESSAGES)
    anchors = [line for line in page.splitlines() if line.startswith("(error-")]
    assert len(anchors) == len(set(anchors)) == page.count("\n- Cause: ") == len(set(MESSAGES))
    assert page.count("\n- Remedy: ") > 0.85 * len(anchors)
    assert all(topic == "_checks" or f"## {title}" in page for topic, title in make_errors.TOPICS.items())


@pytest.mark.parametrize(
    "body",
    ["raise", "raise error", "raise error from None", "raise KeyError(number)", "raise NotImplementedError"],
)
def test_what_has_no_message_of_its_own_is_skipped(body: str, tmp_path: Path):
    source = f"def f(number, error):\n    try:\n        pass\n    except ValueError:\n        {body}\n"
    assert make_errors.read(in_package(tmp_path, source)) == []


@pytest.mark.parametrize("message", ["text", "'%s is wrong' % number", "f'{number}'", "str(number)", "''"])
def test_a_message_that_cannot_be_shown_is_an_error(message: str, tmp_path: Path):
    source = f"def f(number, text):\n    raise ValueError({message})\n"
    with pytest.raises(make_errors.UnreadableMessageError, match=r"data\.made_up"):
        make_errors.read(in_package(tmp_path, source))


def test_a_message_made_by_a_function_of_the_module_is_shown(tmp_path: Path):
    source = """
        class Walk:
            def go(self, steps):
                raise self._diverged(f"after {steps} steps")

            def _diverged(self, how):
                return RuntimeError(_message(self.lr, how))

        def _message(lr, how):
            return f"the walk diverged {how}, with lr={lr}"
    """
    (found,) = make_errors.read(in_package(tmp_path, source))
    assert found[:4] == (
        "RuntimeError",
        "the walk diverged after {steps} steps, with lr={lr}",
        "data.made_up",
        "Walk.go",
    )


def test_a_warning_is_shown_with_its_category(tmp_path: Path):
    source = """
        import warnings
        warnings.warn("it is late: go home", stacklevel=2)
        warnings.warn("it is later", RuntimeWarning, stacklevel=2)
    """
    assert [(m.kind, m.text, m.function) for m in make_errors.read(in_package(tmp_path, source))] == [
        ("UserWarning", "it is late: go home", ""),
        ("RuntimeWarning", "it is later", ""),
    ]


@pytest.mark.parametrize(
    ("text", "cause", "remedy"),
    [
        ("lr is zero: pass another", "lr is zero", "pass another"),
        ("it broke (got a: b); call step() first", "it broke (got a: b)", "call step() first"),
        ("it is gone: was it detached?", "it is gone", "was it detached?"),
        ("it is gone: nothing was changed", "it is gone: nothing was changed", ""),
        ("lr should be above 0 (got {lr})", "lr should be above 0 (got {lr})", "`lr` should be above 0"),
        ("the state dict is odd", "the state dict is odd", make_errors.STATE_DICT),
    ],
)
def test_cause_and_remedy_are_told_apart(text: str, cause: str, remedy: str):
    assert make_errors.parts_of(text) == (cause, remedy)


def test_the_class_says_what_its_constructor_raises(tmp_path: Path):
    source = '''
        class A:
            """One.

            Raises:
                ValueError: If it is odd.
            """

            def __init__(self):
                raise ValueError("odd one")

            def other(self):
                raise ValueError("other one")
    '''
    assert [(m.function, m.raises) for m in make_errors.read(in_package(tmp_path, source))] == [
        ("A", "If it is odd."),
        ("A.other", ""),
    ]


def test_it_runs_from_the_command_line():
    subprocess.run([sys.executable, "-W", "error", str(ROOT / "docs" / "make_errors.py")], check=True, timeout=60)
    assert (ROOT / "docs" / "errors.md").read_text(encoding="utf-8") == make_errors.page(MESSAGES)


def test_a_text_that_classes_have_as_an_attribute_is_shown_for_each(tmp_path: Path):
    source = """
        class Base:
            advice = ""

            def fail(self, index):
                raise RuntimeError(f"{name_of(index)} cannot: {self.advice} What failed: {index}")

        class First(Base):
            advice = "use the first."

        class Second(Base):
            advice = "use the second."
    """
    found = [message.text for message in make_errors.read(in_package(tmp_path, source))]
    assert found == [f"{{batch}} cannot: use the {one}. What failed: {{index}}" for one in ("first", "second")]
