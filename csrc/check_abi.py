"""Prove that the extension uses nothing of torch but its stable ABI: ``python csrc/check_abi.py LIBRARY``.

Every undefined symbol of the library is read with ``nm``. Those of torch have to begin with ``aoti_torch_`` or
``torch_`` (C functions that later versions keep); a mangled C++ name of torch's namespaces is an error.
"""

from __future__ import annotations

import re
import subprocess
import sys

STABLE = re.compile(r"(aoti_)?torch_\w+")
TORCH_NAMESPACES = re.compile(r"\b(at|c10|caffe2|torch)::")


def undefined_symbols(library: str) -> list[str]:
    """Read the symbols that a library expects of others.

    Returns:
        Names as they stand in the library.
    """
    listing = subprocess.run(["nm", "-D", "-u", library], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1].split("@")[0] for line in listing.splitlines()]


def judge(symbols: list[str]) -> tuple[list[str], list[str]]:
    """Sort symbols.

    Returns:
        Those of torch's stable ABI and those of torch that are not stable.
    """
    stable = [name for name in symbols if STABLE.fullmatch(name)]
    names = "\n".join(symbols)
    readable = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    return stable, [line for line in readable.splitlines() if TORCH_NAMESPACES.search(line)]


def main() -> int:
    """Judge the library named on the command line.

    Returns:
        The exit status.
    """
    stable, unstable = judge(undefined_symbols(sys.argv[1]))
    for name in unstable:
        print(f"not of the stable ABI: {name}")
    if not stable:
        print("no symbol of torch at all: is this the extension?")
    print(f"{len(stable)} symbols of torch's stable ABI, {len(unstable)} others of torch")
    return 1 if unstable or not stable else 0


if __name__ == "__main__":
    sys.exit(main())
