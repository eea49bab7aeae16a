"""Every script of the gallery runs by itself, without a warning, and the page names it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GALLERY = Path(__file__).parents[1] / "docs" / "gallery"
SCRIPTS = sorted(GALLERY.glob("plot_*.py"))
PRINTS = {  # what has to be there, beside a figure
    "plot_1_toy_linear": r"ERM \{.*'test': '0\.6\d\d'\}\nFish \{.*'test': '0\.7[45]\d'\}",
    "plot_2_cdsprites": r"ERM: accuracy 0\.[56]\d\d on .*\nSmoothFish: accuracy (0\.9\d\d|1\.000) on",
    "plot_3_own_agreement": r"gamma 0\.0, .* cosine: -0.*\ngamma 0\.1, .* cosine: \+0\.[89]",
    "plot_4_own_method": r"ERM: accuracy .*\nPCGrad: accuracy",
    "plot_5_compare": r"time / ERM(?s:.*)SmoothFish, symmetric",
    "plot_6_tracking_agreement": r"agrees least: odd",
    "plot_7_two_processes": r"(rank [01], epoch \d: .*; same bits on all ranks: True\n){10}",
    "plot_8_resume_after_a_kill": r"resume after step 18, with 2 inner steps(?s:.*)True\}",
    "plot_9_own_training": r"CORAL, averaged(?s:.*)Use (ERM|CORAL|Mixup|Fish)",
}


def test_every_script_is_looked_at_and_named_on_the_page():
    assert [path.stem for path in SCRIPTS] == sorted(PRINTS)
    page = (GALLERY / "index.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(plot_\w+)\.py` \|", page, flags=re.MULTILINE) == sorted(PRINTS)


@pytest.mark.large
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs(script: Path, tmp_path: Path):
    environment = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert re.search(PRINTS[script.stem], finished.stdout), finished.stdout
    assert not list(tmp_path.iterdir())
