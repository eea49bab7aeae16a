"""Gradients side by side: of every kind, there or not, against pair-by-pair arithmetic in double precision."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from _reference import agreement_of, mean_pairwise_cosine, mean_pairwise_inner_product
from hypothesis import given, settings
from torch import Tensor

from torch_gradmatch.gradients.agreement import running_agreement
from torch_gradmatch.gradients.alignment import GradientAlignment
from torch_gradmatch.gradients.flat import FlatVectors

CLOSE = {"rtol": 1e-5, "atol": 1e-5, "check_dtype": False}  # some sums are in single precision

PARAMETERS = {  # what each parameter's gradient is made of
    "double": ((2, 3), torch.float64),
    "complex": ((2,), torch.complex64),
    "single": ((5,), torch.float32),
    "half": ((3, 1), torch.bfloat16),
    "channels_last": ((2, 3, 2, 2), torch.float32),
    "transposed": ((2, 3), torch.float64),
    "expanded": ((4,), torch.float32),
    "sparse": ((4, 2), torch.float32),
    "complex double": ((3,), torch.complex128),
    "scalar": ((), torch.float32),
    "empty": ((0, 3), torch.float64),
}


def draw(name: str, generator: torch.Generator) -> Tensor:
    shape, dtype = PARAMETERS[name]
    if name == "expanded":
        return torch.randn((), generator=generator, dtype=dtype).expand(shape)
    if name == "sparse":
        rows = torch.randint(0, 4, (1, 3), generator=generator)  # not all different
        return torch.sparse_coo_tensor(rows, torch.randn(3, 2, generator=generator), shape, check_invariants=True)
    wide = torch.promote_types(dtype, torch.float32)
    values = torch.randn(shape, generator=generator, dtype=wide).to(dtype)
    if name == "channels_last":
        return values.to(memory_format=torch.channels_last)
    return values.reshape(3, 2).t() if name == "transposed" else values


def dense(gradient: Tensor | None, name: str) -> Tensor:
    shape, dtype = PARAMETERS[name]
    if gradient is None:
        return torch.zeros(shape, dtype=dtype)
    return gradient.to_dense() if gradient.is_sparse else gradient


def in_double(tensors: list[Tensor]) -> Tensor:
    reals = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
    return torch.cat([t.reshape(-1).double() for t in reals])


def by_state(alignment: GradientAlignment) -> GradientAlignment:
    sizes = [torch.Size(shape).numel() * (2 if dtype.is_complex else 1) for shape, dtype in PARAMETERS.values()]
    twin = GradientAlignment(cosines=alignment.cosines)
    twin.check_state_dict(alignment.state_dict(), sizes)
    twin.load_state_dict(alignment.state_dict())
    return twin


BETWEEN: list[Callable[[GradientAlignment], GradientAlignment]] = [
    lambda alignment: alignment,
    copy.deepcopy,
    lambda alignment: pickle.loads(pickle.dumps(alignment)),
    by_state,
]


@settings(deadline=None, max_examples=60)
@given(data=st.data(), domains=st.integers(2, 5), seed=st.integers(0, 2**32), earlier=st.booleans())
def test_gradients_of_every_kind(data: Any, domains: int, seed: int, earlier: bool):
    """Each parameter has a gradient in some domains, perhaps late; between two the sums may be copied or saved."""
    generator, names = torch.Generator().manual_seed(seed), list(PARAMETERS)
    masks = st.lists(st.booleans(), min_size=len(names), max_size=len(names)).filter(any)
    alignment = GradientAlignment()
    if earlier:
        there = data.draw(masks)
        alignment.add([draw(n, generator) if t else None for n, t in zip(names, there, strict=True)])
        alignment.reset(release=data.draw(st.booleans()))
    variance = running_agreement("variance", alignment, domains, like=None)
    gradients: list[list[Tensor | None]] = []
    for _ in range(domains):
        there = data.draw(masks)
        gradients.append([draw(n, generator) if t else None for n, t in zip(names, there, strict=True)])
        variance.sums = alignment = data.draw(st.sampled_from(BETWEEN))(alignment)
        variance.add(gradients[-1])
        alignment.add(gradients[-1])
    full = [[dense(g, n) for g, n in zip(gradient, names, strict=True)] for gradient in gradients]
    flat = [in_double(gradient) for gradient in full]
    measured = alignment.result()
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(flat), **CLOSE)
    torch.testing.assert_close(measured.cosine, mean_pairwise_cosine(flat), **CLOSE)
    torch.testing.assert_close(measured.grad_norms, torch.stack([g.norm() for g in flat]), **CLOSE)
    torch.testing.assert_close(variance.value(), agreement_of("variance", flat), **CLOSE)

    reached = [any(gradient[i] is not None for gradient in gradients) for i in range(len(names))]
    assert alignment.indices == [i for i, there in enumerate(reached) if there]
    means = alignment.mean().tensors(full[0])
    assert [m is not None for m in means] == reached
    for i, mean in enumerate(means):
        expected = sum(in_double([gradient[i]]) for gradient in full)
        if mean is not None:
            assert (mean.shape, mean.dtype) == (full[0][i].shape, full[0][i].dtype)
            rounded = {"rtol": 1e-2, "atol": 1e-2} if mean.dtype == torch.bfloat16 else {}
            torch.testing.assert_close(in_double([mean]), expected / domains, **(CLOSE | rounded))
            torch.testing.assert_close(in_double([alignment.total(i, full[0][i])]), expected, **CLOSE)

    domain = data.draw(st.integers(0, domains - 1))
    given_here = [None if g is None else d for g, d in zip(gradients[domain], full[domain], strict=True)]
    units = sum((g / g.norm() for g in flat if g.norm() > 0), start=torch.zeros_like(flat[0]))
    torch.testing.assert_close(alignment.dot_unit_total(given_here), flat[domain] @ units, **CLOSE)
    combined = alignment.combined(given_here, torch.tensor(-2.0), torch.tensor(0.5), unit=True)
    start = 0
    for i, (v, g) in enumerate(zip(combined, given_here, strict=True)):
        size = in_double([full[domain][i]]).numel()
        assert (v is None) == (g is None)
        if v is not None and g is not None:
            assert (v.shape, v.dtype) == (g.shape, g.dtype)
            expected = 0.5 * (units - 2 * flat[domain])[start : start + size]
            torch.testing.assert_close(in_double([v]), expected, **(CLOSE | {"rtol": 1e-2, "atol": 1e-2}))
        start += size


def test_a_wider_gradient_widens_the_sums():
    alignment = GradientAlignment()
    small = 2.0**-40
    for gradient in (torch.ones(2), torch.full((2,), small, dtype=torch.float64), torch.ones(2)):
        alignment.add([gradient])
    total = alignment.total(0, torch.ones(2))
    assert total.dtype == torch.float64
    assert total.tolist() == [2 + small] * 2


def test_one_vector_in_steady_state_and_none_when_released():
    alignment = GradientAlignment()
    gradients = [torch.ones(50), torch.ones(30, 2)]
    alignment.add(gradients)
    (sums,) = alignment._flat.vectors["sums"]
    alignment.reset()
    alignment.add(gradients)
    assert alignment._flat.vectors["sums"][0] is sums
    assert sums.tolist() == [1.0] * 110
    alignment.reset(release=True)
    assert sums.untyped_storage().nbytes() == 0
    alignment.add(gradients)
    alignment.add(gradients)
    assert alignment._flat.vectors["sums"][0] is sums
    assert sums.tolist() == [2.0] * 110


def test_strides_of_the_first_gradient_are_kept():
    """So that later copies are between tensors of the same strides, which is one launch."""
    gradient = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    flat = FlatVectors([])
    flat.load([torch.ones(1), gradient])
    (copied,) = flat.unload([None, gradient])[1:]
    assert copied is not None
    assert copied.stride() == gradient.stride()
    assert torch.equal(copied, gradient)


@pytest.mark.parametrize("branches", [2, 20])
def test_losses_that_take_ever_other_branches(branches: int):
    """Each parameter but one has a gradient now and then; what was there before leaves nothing behind."""
    flat = FlatVectors([])
    for turn in range(2 * branches + 1):
        chosen = turn % branches
        flat.load([torch.ones(1), *(torch.full((2,), float(i)) if i == chosen else None for i in range(branches))])
        assert flat.scratch[0].sum() == 1 + 2 * chosen
