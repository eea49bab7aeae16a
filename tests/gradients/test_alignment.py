"""Running sums of gradients against pair-by-pair arithmetic."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from _reference import mean_pairwise_cosine, mean_pairwise_inner_product
from hypothesis import given, settings
from torch import Tensor, nn

from torch_gradmatch.gradients.alignment import GradientAlignment, gradient_alignment

domains_and_size = {"domains": st.integers(2, 8), "size": st.integers(1, 12), "seed": st.integers(0, 2**32)}


def draw(domains: int, size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(domains, size, generator=generator, dtype=torch.float64))


def measure(gradients: list[Tensor]) -> GradientAlignment:
    alignment = GradientAlignment()
    for g in gradients:
        alignment.add([g[:1], None, g[1:]])  # spread over parameters, one of them without gradient
    return alignment


@settings(deadline=None)
@given(**domains_and_size)
def test_running_sums_equal_all_pairs(domains, size, seed):
    gradients = draw(domains, size, seed)
    measured = measure(gradients).result()
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(gradients))
    torch.testing.assert_close(measured.cosine, mean_pairwise_cosine(gradients))
    torch.testing.assert_close(measured.grad_norms, torch.stack([g.norm() for g in gradients]))


def test_nearly_orthogonal_gradients_keep_digits():
    """A cosine of 1e-3: |sum|^2 - sum of squares has lost three digits of it, and is summed in double."""
    generator = torch.Generator().manual_seed(0)
    gradients = list(torch.randn(2, 1_000_000, generator=generator))
    alignment = GradientAlignment()
    for g in gradients:
        alignment.add([g])
    expected = torch.dot(gradients[0].double(), gradients[1].double())
    assert abs(expected) < 2e-3 * gradients[0].double().square().sum()
    torch.testing.assert_close(alignment.result().inner_product.double(), expected, rtol=5e-3, atol=0)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), domains=st.integers(2, 6), seed=st.integers(0, 2**32))
def test_parameters_of_all_kinds_each_missing_in_some_domains(data, domains: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    dtypes = [torch.float64, torch.float64, torch.complex128, torch.float64, torch.float32]
    shapes = [(3,), (2, 3), (2,), (1, 1), (5,)]
    present = data.draw(
        st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=domains, max_size=domains)
    )
    alignment, flat = GradientAlignment(), []
    for mask in present:
        gradient = [
            torch.randn(shape, generator=generator, dtype=dtype) if there else None
            for shape, dtype, there in zip(shapes, dtypes, mask, strict=True)
        ]
        alignment.add(gradient)
        whole = [torch.zeros(s, dtype=d) if g is None else g for g, s, d in zip(gradient, shapes, dtypes, strict=True)]
        real = [torch.view_as_real(g) if g.is_complex() else g for g in whole]
        flat.append(torch.cat([g.reshape(-1).double() for g in real]))
    measured = alignment.result()
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}  # some sums are in single precision
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(flat), **close)
    torch.testing.assert_close(measured.cosine, mean_pairwise_cosine(flat), **close)
    torch.testing.assert_close(measured.grad_norms, torch.stack([g.norm() for g in flat]), **close)
    assert [t is not None for t in alignment.total] == [any(column) for column in zip(*present, strict=True)]


def test_long_gradients_keep_their_digits():
    """One product over all elements would have an error of 2e-4 here."""
    gradient = torch.rand(12_000_000, generator=torch.Generator().manual_seed(0))
    alignment = GradientAlignment(cosines=False)
    for _ in range(2):
        alignment.add([gradient])
    expected = torch.dot(gradient.double(), gradient.double())
    torch.testing.assert_close(alignment.result().inner_product.double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(alignment.result().grad_norms[0].double(), expected.sqrt(), rtol=2e-5, atol=0)


def test_sparse_half_and_complex_gradients():
    alignment = GradientAlignment()
    for factor in (1.0, 2.0):
        alignment.add([
            torch.sparse_coo_tensor([[0, 0, 2]], [factor, factor, factor], (4,), check_invariants=True),
            torch.full((3,), 300.0 * factor, dtype=torch.float16),  # squares overflow float16
            torch.tensor([factor + 1j * factor]),
        ])  # fmt: skip
    measured = alignment.result()
    torch.testing.assert_close(measured.inner_product, torch.tensor(2.0 * (4 + 1 + 3 * 90000 + 2)))
    torch.testing.assert_close(measured.cosine, torch.tensor(1.0))


def test_one_domain_has_no_pairs_and_none_no_result():
    alignment = GradientAlignment()
    with pytest.raises(RuntimeError, match=r"call add\(\) first"):
        alignment.result()
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        alignment.add([None, None])
    alignment.add([torch.ones(2)])
    assert alignment.result().inner_product.isnan()
    assert alignment.result().cosine.isnan()
    assert alignment.result().grad_norms.tolist() == pytest.approx([2**0.5])


def test_another_shape_is_refused():
    alignment = GradientAlignment()
    alignment.add([torch.ones(3)])
    with pytest.raises(
        ValueError, match=r"gradient of parameter 0 has shape \(1,\), but one taken in before it had \(3,\)"
    ):
        alignment.add([torch.ones(1)])  # copied into three elements it would count three times
    assert len(alignment) == 1


def test_the_probe_measures_the_domains_gradients_and_touches_no_grad():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model.weight.grad = torch.full((1, 3), 9.0)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(3)]

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    measured = gradient_alignment(model.parameters(), loss_fn, iter(batches))
    gradients = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_fn(b), list(model.parameters()))]) for b in batches
    ]
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(gradients))
    assert model.weight.grad.tolist() == [[9.0] * 3]
    assert model.bias.grad is None


def test_the_probe_refuses_what_it_cannot_measure():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="batches is empty"):
        gradient_alignment([w], lambda x: (w * x).sum(), [])
    with pytest.raises(ValueError, match="no tensor that requires a gradient"):
        gradient_alignment([torch.ones(1)], lambda x: (w * x).sum(), [torch.ones(2)])
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        gradient_alignment([w], lambda x: w * x, [torch.ones(2)])
