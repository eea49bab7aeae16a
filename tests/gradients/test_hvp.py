"""Hessian-vector products, three ways, against closed forms and against the Hessian itself."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import embedding, scaled_dot_product_attention
from torch.utils._pytree import tree_map

from torch_gradmatch.gradients.hvp import hessian_vector_product

EXACT = ["reverse", "forward"]
ALL = [*EXACT, "finite_difference"]


def tolerance(hvp: str) -> dict[str, float]:
    return {"rtol": 1e-10, "atol": 1e-12} if hvp in EXACT else {"rtol": 1e-6, "atol": 1e-7}


@pytest.mark.parametrize("hvp", ALL)
@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_against_the_hessian(hvp: str, size: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    theta, v = torch.randn(2, size, generator=generator, dtype=torch.float64)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return torch.tanh(matrix @ x).square().sum() + x.cos().prod()

    expected = torch.autograd.functional.hessian(loss, theta) @ v
    torch.testing.assert_close(hessian_vector_product(loss, theta, v, hvp), expected, **tolerance(hvp))


@pytest.mark.parametrize("hvp", ALL)
def test_structures_parameters_without_effect_and_a_zero_vector(hvp: str):
    params = {"a": torch.tensor([1.0, 2.0]), "b": [torch.tensor(3.0), torch.tensor(4.0)], "empty": torch.zeros(0)}

    def loss(p: dict[str, Any]) -> Tensor:  # the second of b plays no part
        return p["a"].square().sum() * p["b"][0] + p["empty"].sum()

    vector = {"a": torch.tensor([1.0, 0.0]), "b": [torch.tensor(1.0), torch.tensor(1.0)], "empty": torch.zeros(0)}
    product = hessian_vector_product(loss, params, vector, hvp)
    torch.testing.assert_close(product["a"], torch.tensor([8.0, 4.0]), rtol=1e-3, atol=1e-4)  # 2 b v_a + 2 a v_b
    torch.testing.assert_close(product["b"][0], torch.tensor(2.0), rtol=1e-3, atol=1e-4)
    assert product["b"][1] == 0
    zero = hessian_vector_product(loss, params, tree_map(torch.zeros_like, vector), hvp)
    assert not any(z.any() for z in (zero["a"], *zero["b"]))


@pytest.mark.parametrize("hvp", ["reverse", "finite_difference"])
def test_complex_parameters_are_pairs_of_reals(hvp: str):
    theta, v = torch.tensor([[1 + 2j, 0.5 - 1j], [0.3 + 1j, -1 + 0.2j]], dtype=torch.complex128)
    pairs, pairs_v = torch.view_as_real(theta), torch.view_as_real(v)
    expected = hessian_vector_product(lambda x: (torch.view_as_complex(x) ** 3).abs().sum(), pairs, pairs_v)
    found = hessian_vector_product(lambda x: (x**3).abs().sum(), theta, v, hvp)
    torch.testing.assert_close(torch.view_as_real(found), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hvp", ["reverse", "finite_difference"])
def test_sparse_gradients_become_dense(hvp: str):
    rows = torch.tensor([0, 2, 2])
    weight, v = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(w: Tensor, *, sparse: bool) -> Tensor:
        return embedding(rows, w, sparse=sparse).square().sum() ** 2

    expected = hessian_vector_product(lambda w: loss(w, sparse=False), weight, v)
    found = hessian_vector_product(lambda w: loss(w, sparse=True), weight, v, hvp)
    torch.testing.assert_close(found, expected, **tolerance(hvp))


@pytest.mark.parametrize("hvp", ALL)
@pytest.mark.parametrize("length", [1e-25, 1e-10, 1.0, 1e10, 1e20])
def test_very_long_and_very_short_vectors(hvp: str, length: float):
    theta = torch.tensor([1.0, 2.0])
    found = hessian_vector_product(lambda p: (p**3).sum(), theta, length * torch.tensor([1.0, -1.0]), hvp)
    torch.testing.assert_close(found / length, torch.tensor([6.0, -12.0]), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("params", "vector"), [(torch.ones(3), torch.ones(1)), ({"a": torch.ones(2)}, torch.ones(2))])
def test_a_vector_of_another_structure_or_shape_is_refused(params: Any, vector: Tensor):
    with pytest.raises(ValueError, match=r"vector should have the structure and shapes of params, .*\(got \("):
        hessian_vector_product(lambda p: (p**3).sum(), params, vector)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_stays_not_a_number(bad: float):
    vector = torch.tensor([1.0, bad])
    found = hessian_vector_product(lambda p: (p**3).sum(), torch.tensor([1.0, 2.0]), vector, "finite_difference")
    assert not found.isfinite().any()


# ------------------------------------------------------------------------------------------- missing derivatives


class Once(torch.autograd.Function):
    """A square of the old style whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class OldStyle(Once):
    """The same, whose backward pass can be differentiated, but without a forward derivative."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def test_without_second_derivative_the_remedy_is_named_and_works():
    theta, v = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return Once.apply(x).square().sum()  # sum x^4, H = 12 x^2

    with pytest.raises(RuntimeError, match=r'hvp="finite_difference", which needs first derivatives only.*once_diff'):
        hessian_vector_product(loss, theta, v, "reverse")
    with pytest.raises(RuntimeError, match=r'use hvp="reverse", which asks less.*implement the jvp'):
        hessian_vector_product(loss, theta, v, "forward")
    found = hessian_vector_product(loss, theta, v, "finite_difference")
    torch.testing.assert_close(found, 12 * theta**2 * v, rtol=1e-6, atol=1e-6)
    found = hessian_vector_product(lambda x: OldStyle.apply(x).square().sum(), theta, v)
    torch.testing.assert_close(found, 12 * theta**2 * v)


@pytest.mark.parametrize("hvp", ALL)
def test_other_errors_are_not_explained_away(hvp: str):
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        hessian_vector_product(Mock(side_effect=RuntimeError("out of memory")), torch.ones(2), torch.ones(2), hvp)


@pytest.mark.parametrize("hvp", EXACT)
def test_attention_is_differentiated_twice(hvp: str):
    """By its MATH kernel: the default one has no second derivative."""
    generator = torch.Generator().manual_seed(0)
    q, v = torch.randn(2, 1, 2, 3, 4, generator=generator, dtype=torch.float64)

    def by_hand(x: Tensor) -> Tensor:
        return (torch.softmax(x @ x.transpose(-1, -2) / 2, dim=-1) @ x).square().sum()

    def by_kernel(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x).square().sum()

    torch.testing.assert_close(hessian_vector_product(by_kernel, q, v, hvp), hessian_vector_product(by_hand, q, v))


# --------------------------------------------------------------------------------- the error that hvp.py states


def cnn() -> nn.Module:
    convolutions: list[nn.Module] = []
    for i, o in ((3, 8), (8, 16)):
        convolutions += [nn.Conv2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.GELU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(256, 10))


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, activation="gelu")
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-3), (torch.float64, 4e-9)], ids=["fp32", "fp64"])
@pytest.mark.parametrize(("build", "shape"), [(mlp, (16, 64)), (cnn, (8, 3, 16, 16)), (transformer, (8, 4, 16))])
def test_error_of_finite_differences(build: Any, shape: tuple[int, ...], dtype: torch.dtype, bound: float):
    torch.manual_seed(0)
    model = build().to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.arange(shape[0]) % 10
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(p: dict[str, Tensor]) -> Tensor:
        fresh = {k: b.clone() for k, b in buffers.items()}
        return nn.functional.cross_entropy(functional_call(model, {**p, **fresh}, (x,)), y)

    v = {k: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) for k, p in params.items()}
    exact, found = (
        torch.cat([t.reshape(-1) for t in hessian_vector_product(loss, params, v, hvp).values()])
        for hvp in ("reverse", "finite_difference")
    )
    error = float((found - exact).norm() / exact.norm())
    assert 0 < error < bound
