"""The paper's settings for WILDS: the table of the code, that of the documentation, and the authors' own numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples" / "wilds"

FIELDS = ("optimizer", "lr", "batch_size", "meta_lr", "domains_per_step", "warm_start", "epochs", "metric", "domain")
AUTHORS = {
    "fmow": ("adam", 1e-4, 64, 0.01, 5, 24000, 12, "acc_worst_region", "year x region"),
    "camelyon": ("sgd", 1e-4, 32, 0.01, 3, 10000, 20, "acc_avg", "hospital"),
    "poverty": ("adam", 1e-3, 64, 0.1, 5, 0, 200, "r_wg", "country"),
    "iwildcam": ("adam", 1e-4, 16, 0.01, 10, 24000, 18, "F1-macro_all", "location"),
    "amazon": ("adam", 2e-6, 8, 0.01, 5, 31000, 3, "10th_percentile_acc", "user"),
    "civil": ("adam", 1e-5, 16, 0.05, 5, 20000, 5, "acc_wg", "identity x label"),
}


def test_the_settings_are_the_authors(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from wilds_settings import PAPER

    assert {name: tuple(getattr(s, field) for field in FIELDS) for name, s in PAPER.items()} == AUTHORS
    assert all(s.divided and s.epsilon == s.meta_lr / s.domains_per_step for s in PAPER.values())


def test_packages_that_are_missing_are_named(tmp_path):
    """An environment without them: Python with no more than torch and this package would do, but not build so soon."""
    hide = tmp_path / "sitecustomize.py"
    hide.write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name in {'wilds', 'torchvision'} else find(name, package)\n"
    )
    command = [sys.executable, str(FOLDER / "train.py"), "--dataset", "civil", "--root", "data", "--method", "fish"]
    found = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert "this script needs wilds, torchvision" in found.stderr
    assert "pip install wilds torchvision" in found.stderr
    assert "Traceback" not in found.stderr
