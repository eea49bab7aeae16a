"""What runs the site's pages finds every block, and a page that does not print what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def run_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_pages", DOCS / "run_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGE = """# A page

<!-- run
hidden = 2
-->

```python
shown = hidden + 1
print(shown, 0.123456)
```

```text
3 0.12...
```

```python no-run
raise RuntimeError
```

```sh
exit 1
```

:::python
print("last")
:::
"""


def test_every_block_runs_in_one_namespace(run_pages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert run_pages.run_page(page) == 3
    assert capsys.readouterr().out == "", "what pages print is not the runner's"
    lines = [block.line for block in run_pages.blocks_of(PAGE)]
    assert [PAGE.splitlines()[line - 1] for line in lines] == ["hidden = 2", "shown = hidden + 1", 'print("last")']


def test_another_output_than_the_page_says_is_an_error(run_pages: ModuleType, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("3 0.12...", "4 0.12..."))
    with pytest.raises(AssertionError, match=r"line 8 of .* prints\n3 0.123456\nand the page says\n4 0.12"):
        run_pages.run_page(page)


def test_an_error_is_at_the_line_of_the_page(run_pages: ModuleType, tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("hidden + 1", "hidden / 0"))
    with pytest.raises(ZeroDivisionError) as caught:
        run_pages.run_page(page)
    assert caught.traceback[-1].lineno + 1 == PAGE.splitlines().index("shown = hidden + 1") + 1


def test_a_page_that_fails_fails_the_command(run_pages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, bad = DOCS / "cite.md", tmp_path / "bad.md"
    bad.write_text("```python\nassert False\n```\n")
    assert run_pages.main([str(bad)]) == 1
    assert "bad.md fails:" in capsys.readouterr().err
    assert good in run_pages.pages()


def test_pages_show_python_that_runs_or_say_that_it_does_not(run_pages: ModuleType):
    """A fence with a misspelt option would be shown and never run."""
    for path in run_pages.pages():
        text = path.read_text(encoding="utf-8")
        fences = [line for line in text.splitlines() if line.lstrip("`:{").startswith(("python", "Python"))]
        fences = [line for line in fences if line.startswith(("```", ":::"))]
        assert all(line.strip("`:{}") in {"python", "python no-run"} for line in fences), path
        run = sum(line.strip("`:{}") == "python" for line in fences)
        hidden = text.count("<!-- run\n")
        assert len(list(run_pages.blocks_of(text))) == run + hidden, path
