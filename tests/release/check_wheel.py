"""Prove what a repaired wheel is: ``python tests/release/check_wheel.py RAW REPAIRED``.

It has the libraries of the raw one, which still need torch's by name, and none of torch's own; they use nothing of
torch but its stable ABI; its tag is that of a manylinux. Says what the wheel is, and loudly if it has no CUDA library.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch_gradmatch/_C.abi3.so", "torch_gradmatch/_C_cuda.abi3.so")


def say(message: str) -> None:
    """Print it before what a program started later prints."""
    sys.stdout.write(f"{message}\n")
    sys.stdout.flush()


def needed(library: Path) -> list[str]:
    """Read which libraries a library names."""
    listing = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", listing)


def main() -> int:
    raw, repaired = (Path(argument) for argument in sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder:
        names = {}
        for which, wheel in (("raw", raw), ("repaired", repaired)):
            with ZipFile(wheel) as archive:
                archive.extractall(Path(folder) / which)
                names[which] = sorted(name for name in archive.namelist() if re.search(r"\.so(\.|$)", name))
        if names["raw"] != names["repaired"] or not set(names["raw"]) <= set(LIBRARIES):
            sys.exit(f"{repaired.name} has {names['repaired']}, the wheel it was made from {names['raw']}")
        if LIBRARIES[0] not in names["raw"]:
            sys.exit(f"{repaired.name} has no native extension")
        for name in names["raw"]:
            before, after = (needed(Path(folder) / which / name) for which in ("raw", "repaired"))
            if before != after or "libtorch_cpu.so" not in after:
                sys.exit(f"{name} needed {before} and now needs {after}")
            say(f"{name} needs {', '.join(after)}")
        libraries = [str(Path(folder) / "repaired" / name) for name in names["repaired"]]
        if subprocess.run([sys.executable, str(ROOT / "tools" / "check_abi.py"), *libraries], check=False).returncode:
            return 1
    if "manylinux" not in repaired.name:
        sys.exit(f"{repaired.name} has no tag of a manylinux")
    say(f"{repaired}: {repaired.stat().st_size / 2**20:.2f} MiB")
    if LIBRARIES[1] not in names["repaired"]:
        stars = "*" * 100
        say(f"{stars}\nTHIS WHEEL HAS NO CUDA LIBRARY: nvcc was not found. It is not one to release.\n{stars}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
