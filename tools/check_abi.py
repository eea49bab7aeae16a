"""Prove that the extension uses nothing of torch but its stable ABI: ``python tools/check_abi.py LIBRARY...``.

Every undefined symbol of the libraries is read with ``nm``. Those of torch have to begin with ``aoti_torch_`` or
``torch_`` (C functions that later versions keep); a mangled C++ name of torch's namespaces is an error. So is a symbol
of CUDA: its run time is linked into the library that uses it.
"""

from __future__ import annotations

import re
import subprocess
import sys

STABLE = re.compile(r"(aoti_)?torch_\w+")
TORCH_NAMESPACES = re.compile(r"\b(at|c10|caffe2|torch)::")
CUDA = re.compile(r"(cuda|cu)[A-Z]\w*|__cuda\w+")


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
        Those of torch's stable ABI, and those of torch or CUDA that no other version need have.
    """
    stable = [name for name in symbols if STABLE.fullmatch(name)]
    names = "\n".join(symbols)
    readable = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    unstable = [line for line in readable.splitlines() if TORCH_NAMESPACES.search(line) or CUDA.fullmatch(line)]
    return stable, unstable


def main() -> int:
    """Judge the libraries named on the command line.

    Returns:
        The exit status.
    """
    good = len(sys.argv) > 1
    for library in sys.argv[1:]:
        stable, unstable = judge(undefined_symbols(library))
        for name in unstable:
            print(f"{library}: not of the stable ABI: {name}")
        if not stable:
            print(f"{library}: no symbol of torch at all: is this the extension?")
        print(f"{library}: {len(stable)} symbols of torch's stable ABI, {len(unstable)} others of torch or CUDA")
        good = good and bool(stable) and not unstable
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
