"""Copies of many tensors at once: exact, whatever they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from torch_gradmatch.parallel.foreach import clone_all, copy_all_

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.complex128, torch.float8_e4m3fn,
]  # fmt: skip


def bits(tensor: Tensor) -> list[int]:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize("new", [True, False], ids=["this-torch", "without-foreach_clone"])
def test_clones_of_every_dtype_have_every_bit(new: bool, monkeypatch: pytest.MonkeyPatch):
    if not new:
        monkeypatch.delattr(torch, "_foreach_clone", raising=False)
    generator = torch.Generator().manual_seed(0)
    originals = []
    for dtype in DTYPES * 2:
        raw = torch.randint(0, 2 if dtype == torch.bool else 256, (6 * dtype.itemsize,), generator=generator)
        originals.append(raw.to(torch.uint8).view(dtype).reshape(2, 3))  # NaNs and denormals among them
    originals += [torch.zeros(0), torch.ones(()), torch.ones(3, 4).t(), torch.ones(1).expand(5)]
    originals += [nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True) * 2]
    before = [bits(t) for t in originals]
    copies = clone_all(originals)
    for copy, original, expected in zip(copies, originals, before, strict=True):
        assert (copy.dtype, copy.shape) == (original.dtype, original.shape)
        assert bits(copy) == expected
        assert not copy.requires_grad
        assert copy.numel() == 0 or copy.data_ptr() != original.data_ptr()
    assert copies[-4].stride() == (1, 4)


def test_clones_of_a_subclass_of_sparse_tensors_and_inside_a_transform():
    class Marked(Tensor):
        pass

    def f(x: Tensor) -> Tensor:
        return clone_all([x, torch.ones(())])[0] + x

    sparse = torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (4,), check_invariants=True)
    copies = clone_all([torch.ones(2).as_subclass(Marked), sparse, torch.ones(1)])
    assert type(copies[0]) is Marked
    assert copies[1].to_dense().tolist() == [1.0, 0.0, 2.0, 0.0]
    assert clone_all([]) == []
    assert torch.func.vmap(f)(torch.arange(3.0)).tolist() == [0.0, 2.0, 4.0]
    assert torch.func.grad(f)(torch.tensor(2.0)) == 1.0  # of the second summand: the clone is detached


def test_copies_into_other_dtypes():
    sources = [torch.ones(2, dtype=torch.bfloat16), torch.ones(3), torch.full((1,), 2.0, dtype=torch.bfloat16)]
    targets = [torch.zeros(2), torch.zeros(3), torch.zeros(1, requires_grad=True)]
    copy_all_(targets, sources)
    assert [t.tolist() for t in targets] == [[1.0, 1.0], [1.0] * 3, [2.0]]
    assert targets[2].requires_grad
