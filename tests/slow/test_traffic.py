"""The bytes that the interpolation moves where there is no kernel for a device: what a kernel could save at most."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torch_gradmatch.slow.ops import _interpolate_foreach

# Which of an operation's lists of tensors are read and which are written.
READ = {"_foreach_lerp_": (0, 1), "_foreach_copy_": (1,), "lerp_": (0, 1)}
WRITTEN = {"_foreach_lerp_": (0,), "_foreach_copy_": (0,), "lerp_": (0,)}


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        result = operation(*args, **(kwargs or {}))
        if name == "_to_copy":
            self.bytes += args[0].nbytes + result.nbytes
        else:
            for where in (READ[name], WRITTEN[name]):
                for position in where:
                    tensors = [args[position]] if isinstance(args[position], Tensor) else args[position]
                    self.bytes += sum(tensor.nbytes for tensor in tensors)
        return result


@pytest.mark.parametrize(
    ("slow_dtype", "fast_dtype", "kernel", "foreach"),
    [
        (torch.float32, torch.float32, 16, 20),
        (torch.float64, torch.float64, 32, 40),
        (torch.bfloat16, torch.bfloat16, 8, 10),
        (torch.float32, torch.bfloat16, 12, 24),
    ],
    ids=str,
)
def test_bytes_for_each_parameter(slow_dtype: torch.dtype, fast_dtype: torch.dtype, kernel: int, foreach: int):
    """The kernel reads and writes each tensor once."""
    slow = [torch.zeros(1000, dtype=slow_dtype) for _ in range(50)]
    fast = [torch.ones(1000, dtype=fast_dtype) for _ in range(50)]
    with Traffic() as traffic:
        _interpolate_foreach(slow, fast, 0.3)
    assert traffic.bytes == foreach * 50_000
    assert kernel == 2 * (slow[0].element_size() + fast[0].element_size())
