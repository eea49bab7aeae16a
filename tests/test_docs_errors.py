"""The page of all errors is a plain list of what the sources raise."""

from __future__ import annotations

import sys
from pathlib import Path

import torch_gradmatch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import make_errors  # noqa: E402

SOURCE = """
def lr_of(value):
    if value < 0:
        raise ValueError(f"lr should be positive (got {value!r}): "
                         "lower it")
    if value > 9:
        warnings.warn("too long a step", stacklevel=2)
    error = RuntimeError("made here")
    error = RuntimeError("made here")
    raise error
    raise KeyError(name)
"""


def test_every_message_is_there_once_with_its_values_by_name():
    assert sorted(make_errors.messages(SOURCE)) == sorted(
        [
            ("ValueError", "lr should be positive (got {value}): lower it"),
            ("RuntimeError", "made here"),
            ("UserWarning", "too long a step"),
        ]
    )


def test_the_page_has_the_messages_of_the_package(tmp_path: Path):
    make_errors.write(Path(torch_gradmatch.__file__).parent, tmp_path / "errors.md")
    text = (tmp_path / "errors.md").read_text()
    assert "## `torch_gradmatch.evaluation.arguments`" in text
    assert "make_model should return a torch.nn.Module (got {type(model).__name__})" in text
    assert text.count("```text") > 150
