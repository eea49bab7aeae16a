"""Prove that the CUDA kernel's machine code is what was meant: ``python tools/check_machine_code.py LIBRARY``.

For each architecture in the library and each pair of dtypes: no register is spilled to memory, so few are used that the
blocks that were asked for fit, and both tensors are read and written by whole vectors, 16 bytes of the wider dtype, in
the unrolled part and in the last block of a tensor. ``cuobjdump`` and ``nvdisasm`` read it, of NVIDIA's packages
``nvidia-cuda-cuobjdump`` and ``nvidia-cuda-nvdisasm`` or of the toolkit.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

MOST_REGISTERS = 64  # of 65,536: for 4 blocks of 256 threads
UNROLLED = 4  # vectors that a thread has in flight
BYTES = {"f": 4, "d": 8, "6__half": 2, "13__nv_bfloat16": 2}
NAME = re.compile(r"interpolate_kernelI(f|d|6__half|13__nv_bfloat16)(f|d|6__half|13__nv_bfloat16|S\d?_)")


@dataclass
class Kernel:
    """One kernel's machine code.

    Attributes:
        architecture: As ``sm_90``.
        name: Mangled.
        registers: Of a thread.
        accesses: How often it has each instruction that touches memory, as ``("LDG", 128)``.
    """

    architecture: str
    name: str
    registers: int = 0
    accesses: Counter[tuple[str, int]] = field(default_factory=Counter)

    def faults(self) -> list[str]:
        """Find what is not as meant.

        Returns:
            Sentences.
        """
        found = NAME.search(self.name)
        if found is None:
            return ["is no interpolate_kernel"]
        slow = BYTES[found[1]]
        fast = BYTES.get(found[2], slow)  # S2_: the same type once more
        faults = []
        if not 0 < self.registers <= MOST_REGISTERS:
            faults.append(f"uses {self.registers} registers, should use {MOST_REGISTERS} at most")
        spilled = sum(n for (what, _), n in self.accesses.items() if what in {"LDL", "STL"})
        if spilled:
            faults.append(f"spills: {spilled} accesses to local memory")
        widths = Counter(128 * size // max(slow, fast) for size in (slow, fast))
        for width, tensors in widths.items():
            least = tensors * (UNROLLED + 1)
            for what in ("LDG", "STG"):
                if self.accesses[what, width] < least:
                    faults.append(
                        f"has {self.accesses[what, width]} {what} of {width} bits, should have {least} or more"
                    )
        return faults


def tool(name: str) -> str:
    """Find one of NVIDIA's tools, in a package or on the path.

    Returns:
        Its path.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob(f"*/bin/{name}"):
            return str(path)
    found = shutil.which(name)
    return found or sys.exit(f"{name} is not found: pip install nvidia-cuda-{name}")


def read(library: str) -> list[Kernel]:
    """Read a library's machine code.

    Returns:
        Every kernel, of every architecture.
    """
    cuobjdump, beside = tool("cuobjdump"), str(Path(tool("nvdisasm")).parent)
    environment = os.environ | {"PATH": os.pathsep.join([beside, os.environ.get("PATH", "")])}
    kernels: dict[tuple[str, str], Kernel] = {}
    for option in ("-sass", "-res-usage"):
        command = [cuobjdump, option, library]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        architecture = name = ""
        for line in text.splitlines():
            if start := re.match(r"arch = (sm_\w+)", line):
                architecture = start[1]
            elif start := re.search(r"Function :? ?([^\s:]+)", line):
                name = start[1]
                kernels.setdefault((architecture, name), Kernel(architecture, name))
            elif access := re.search(r"\b(LDG|STG|LDL|STL)\b([.\w]*)", line):
                width = re.search(r"\.(64|128)\b", access[2])
                kernels[architecture, name].accesses[access[1], int(width[1]) if width else 32] += 1
            elif used := re.search(r"\bREG:(\d+)", line):
                kernels[architecture, name].registers = int(used[1])
    return list(kernels.values())


def main() -> int:
    """Judge the library named on the command line.

    Returns:
        The exit status.
    """
    kernels = read(sys.argv[1])
    faults = [f"{k.architecture} {k.name} {fault}" for k in kernels for fault in k.faults()]
    for fault in faults:
        print(fault)
    architectures = sorted({kernel.architecture for kernel in kernels}, key=lambda name: int(re.sub(r"\D", "", name)))
    incomplete = [a for a in architectures if sum(k.architecture == a for k in kernels) != 6]
    for architecture in incomplete or ([] if kernels else ["no architecture"]):
        print(f"{architecture} should have a kernel for each of six pairs of dtypes")
    most = max((kernel.registers for kernel in kernels), default=0)
    print(f"{len(kernels)} kernels for {', '.join(architectures)}, {most} registers at most, {len(faults)} faults")
    return 1 if faults or incomplete or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
