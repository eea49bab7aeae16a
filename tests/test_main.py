"""``python -m torch_gradmatch`` says what there is and what to do about what is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import torch_gradmatch
from torch_gradmatch.__main__ import EXTRAS

ROOT = Path(__file__).parents[1]


def printed(code: str = "") -> str:
    run = f"{code}import runpy; runpy.run_module('torch_gradmatch', run_name='__main__')"
    command = [sys.executable, "-W", "error", "-c", run]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout


def test_it_says_version_torch_kernels_and_extras():
    lines = printed().splitlines()
    assert lines[0].startswith(f"torch_gradmatch {torch_gradmatch.__version__} in ")
    assert lines[1].startswith(f"torch {torch.__version__}, CUDA {torch.version.cuda}, ")
    assert lines[2] == f"interpolation by {torch_gradmatch.native_status()}"
    for line, (extra, packages) in zip(lines[3:], EXTRAS.items(), strict=True):
        assert line.startswith(f"extra {extra}: ")
        assert line.endswith("installed") is all(find_spec(name) for name in packages)


def test_what_is_missing_is_named_with_a_command():
    hide = "import importlib.util as u; found = u.find_spec\n"
    hide += "u.find_spec = lambda name: None if name in ('pandas', 'scipy', 'torchdata') else found(name)\n"
    said = printed(hide)
    assert 'extra evidence: without pandas, scipy: pip install "torch_gradmatch[evidence]"' in said
    assert 'extra data: without torchdata: pip install "torch_gradmatch[data]"' in said


def test_the_extras_are_those_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    for extra, packages in EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*)\]$", text, flags=re.MULTILINE)
        assert tuple(re.findall(r'"([\w-]+)[\[>]', listed)) == packages
