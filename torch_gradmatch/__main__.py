"""Says what there is, and what to do about what is missing: ``python -m torch_gradmatch``."""

from __future__ import annotations

import platform
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import torch_gradmatch

EXTRAS = {
    "evidence": ("joblib", "matplotlib", "pandas", "scipy", "tqdm"),
    "data": ("torchdata",),
    "torchjd": ("torchjd",),
}

if __name__ == "__main__":
    gpu = "no GPU"
    if torch.cuda.is_available():
        torch.cuda.init()  # so that the status tells whether the kernel runs on these GPUs
        gpu = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    lines = [f"torch_gradmatch {torch_gradmatch.__version__} in {Path(torch_gradmatch.__file__).parent}"]
    lines += [f"torch {torch.__version__}, CUDA {torch.version.cuda}, {gpu}; Python {platform.python_version()}"]
    lines += [f"interpolation by {torch_gradmatch.native_status()}"]
    for extra, packages in EXTRAS.items():
        missing = ", ".join(name for name in packages if find_spec(name) is None)
        what = f'without {missing}: pip install "torch_gradmatch[{extra}]"' if missing else "installed"
        lines.append(f"extra {extra}: {what}")
    sys.stdout.write("\n".join(lines) + "\n")
