"""Running sums of gradients against pair-by-pair arithmetic, and each domain against each other and the rest."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from _reference import mean_pairwise_cosine, mean_pairwise_inner_product, pairwise_cosines, with_rest
from hypothesis import given, settings
from torch import Tensor, nn

from torch_gradmatch.gradients.alignment import GradientAlignment, gradient_alignment

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.complex128]
Gradient = list[Tensor | None]


def measure(gradients: list[Gradient], **options: bool) -> Any:
    alignment = GradientAlignment(**options)
    for gradient in gradients:
        alignment.add(gradient)
    return alignment.result()


@st.composite
def many_kinds(draw: st.DrawFn) -> list[Gradient]:
    """Of 2 to 6 domains over 3 parameters: some missing, one strided, some complex or half, some zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    found: list[Gradient] = []
    for _ in range(draw(st.integers(2, 6))):
        domain: Gradient = []
        for index, dtype in enumerate(dtypes):
            g = torch.randn(4, 3, generator=generator, dtype=torch.float64).to(dtype)
            kind = draw(st.sampled_from(["dense", "none", "transposed", "zero"]))
            g = {"transposed": g.T.contiguous().T, "zero": torch.zeros_like(g)}.get(kind, g)
            domain.append(None if kind == "none" and index else g)
        found.append(domain)
    return found


def flat(domain: Gradient, like: list[Tensor]) -> Tensor:
    whole = [torch.zeros_like(other) if g is None else g for g, other in zip(domain, like, strict=True)]
    return torch.cat([(torch.view_as_real(g) if g.is_complex() else g).double().reshape(-1) for g in whole])


@settings(deadline=None)
@given(domains=many_kinds())
def test_sums_and_cosines_are_those_of_each_pair_by_itself(domains: list[Gradient]):
    """A complex parameter counts as twice as many real ones, also where a domain has no gradient for it."""
    known = [[d[i] for d in domains if d[i] is not None] for i in range(3)]
    like = [torch.zeros(4, 3) if not gs else gs[0] for gs in known]
    vectors, measured = [flat(d, like) for d in domains], measure(domains, pairs=True)
    exact = all(g is None or g.dtype in (torch.float64, torch.complex128) for d in domains for g in d)
    tolerance = 1e-12 if exact else 2e-5
    torch.testing.assert_close(measured.cosines.double(), pairwise_cosines(vectors), rtol=0, atol=tolerance)
    torch.testing.assert_close(measured.cosine.double(), mean_pairwise_cosine(vectors), rtol=0, atol=2e-5)
    close = {"check_dtype": False, "rtol": 1e-7 if exact else 1e-5, "atol": 1e-7 if exact else 1e-6}
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(vectors), **close)
    torch.testing.assert_close(measured.grad_norms, torch.stack([v.norm() for v in vectors]), **close)
    for found in (measure(domains), measure(domains, cosines=False)):
        assert found.inner_product == measured.inner_product
        assert torch.equal(found.grad_norms, measured.grad_norms)


def test_nearly_orthogonal_gradients_keep_digits():
    """A cosine of 1e-3: |sum|^2 - sum of squares has lost three digits of it, and is summed in double."""
    one, other = torch.randn(2, 1_000_000, generator=torch.Generator().manual_seed(0))
    expected = torch.dot(one.double(), other.double())
    assert abs(expected) < 2e-3 * one.double().square().sum()
    found = measure([[one], [other]]).inner_product
    torch.testing.assert_close(found.double(), expected, rtol=5e-3, atol=0)


def test_long_gradients_keep_their_digits():
    """One product over all elements would have an error of 2e-4 here."""
    gradient = torch.rand(12_000_000, generator=torch.Generator().manual_seed(0))
    found = measure([[gradient]] * 2, cosines=False)
    expected = torch.dot(gradient.double(), gradient.double())
    torch.testing.assert_close(found.inner_product.double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(found.grad_norms[0].double(), expected.sqrt(), rtol=2e-5, atol=0)


def test_sparse_half_and_complex_gradients():
    gradients: list[Gradient] = [
        [
            torch.sparse_coo_tensor([[0, 0, 2]], [factor, factor, factor], (4,), check_invariants=True),
            torch.full((3,), 300.0 * factor, dtype=torch.float16),  # squares overflow float16
            torch.tensor([factor + 1j * factor]),
        ]
        for factor in (1.0, 2.0)
    ]
    measured = measure(gradients)
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
    has = r"gradient of parameter 0 has shape \(1,\), but one taken in before it had \(2,\)"
    with pytest.raises(ValueError, match=has):
        alignment.add([torch.ones(1)])  # copied into two elements it would count twice
    assert len(alignment) == 1


def test_the_gradients_are_copies():
    alignment, gradient = GradientAlignment(pairs=True), torch.tensor([1.0, 0.0])
    alignment.add([gradient])
    gradient.copy_(torch.tensor([0.0, 1.0]))
    alignment.add([gradient])
    assert alignment.result().cosines.tolist() == [[1.0, 0.0], [0.0, 1.0]]


# ---------------------------------------------------------------------------------------------------------- the rest


def rest_of(gradients: list[Tensor]) -> Tensor:
    return measure([[g[:2], None, g[2:]] for g in gradients], pairs=True).agreement_with_rest


@settings(deadline=None)
@given(lengths=st.lists(st.sampled_from([0.0, 1e-4, 1.0, 1e3]), min_size=1, max_size=7), seed=st.integers(0, 2**32))
def test_the_gram_matrix_tells_the_cosine_with_the_sum_of_the_others(lengths: list[float], seed: int):
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(5, generator=generator, dtype=torch.float64) * length for length in lengths]
    torch.testing.assert_close(rest_of(gradients), with_rest(gradients), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_counts_as_zero_and_not_as_rounding(dtype: torch.dtype):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    found = rest_of([a, 3 * a, -4 * a + 1e-5 * b, b])  # the first three's rest says nothing in single precision
    assert float(found[3]) == pytest.approx(0.0 if dtype == torch.float32 else 1.0, abs=1e-3)


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_neither_underflows_nor_overflows(scale: float):
    gradients = [scale * g for g in torch.randn(3, 5, generator=torch.Generator().manual_seed(0))]
    expected = with_rest([g.double() for g in gradients])
    torch.testing.assert_close(rest_of(gradients).double(), expected, rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- the probe


def test_the_probe_measures_the_domains_gradients_and_touches_no_grad():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    model.weight.grad = torch.full((1, 3), 9.0)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(3)]

    def loss_fn(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    measured = gradient_alignment(model.parameters(), loss_fn, iter(batches))
    gradients = [torch.autograd.grad(loss_fn(b), list(model.parameters())) for b in batches]
    vectors = [torch.cat([g.reshape(-1) for g in gs]) for gs in gradients]
    torch.testing.assert_close(measured.inner_product, mean_pairwise_inner_product(vectors))
    assert model.weight.grad.tolist() == [[9.0] * 3]
    assert model.bias.grad is None


W = torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("params", "loss_fn", "batches", "message"),
    [
        ([W], lambda x: (W * x).sum(), [], "batches is empty"),
        ([torch.ones(1)], lambda x: (W * x).sum(), [torch.ones(2)], "no tensor that requires a gradient"),
        ([W], lambda x: W * x, [torch.ones(2)], r"shape \(2,\)"),
    ],
    ids=["empty", "frozen", "vector"],
)
def test_the_probe_refuses_what_it_cannot_measure(params: Any, loss_fn: Any, batches: Any, message: str):
    with pytest.raises(ValueError, match=message):
        gradient_alignment(params, loss_fn, batches)


def test_gradient_alignment_draws_the_pairs_with_their_names():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    domains = {"north": torch.tensor([1.0, 0.0]), "south": torch.tensor([1.0, 2.0]), 3: torch.tensor([-1.0, 0.0])}
    measured = gradient_alignment([W], lambda x: (W * x).sum(), domains, pairs=True)
    assert measured.domains == ("north", "south", 3)
    axes, mine = measured.plot(), plt.figure().subplots()
    axes.figure.canvas.draw()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["north", "south", "3"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["north", "south", "3"]
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), measured.cosines, check_dtype=False)
    assert gradient_alignment([W], lambda x: (W * x).sum(), list(domains.values()), pairs=True).plot(mine) is mine
    assert [t.get_text() for t in mine.get_xticklabels()] == ["0", "1", "2"]
    plt.close("all")


def test_without_pairs_there_is_nothing_to_draw():
    measured = gradient_alignment([W], lambda x: (W * x).sum(), [1.0, 2.0])
    assert (measured.cosines, measured.domains) == (None, None)
    with pytest.raises(RuntimeError, match=r"gradient_alignment\(\.\.\., pairs=True\)"):
        measured.plot()
