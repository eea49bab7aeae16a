"""First derivatives go by ``backward()``, and a gradient that is differentiated again is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from _ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from torch_gradmatch.gradients.alignment import gradient_alignment
from torch_gradmatch.gradients.backward import check_backward, gradient_of
from torch_gradmatch.gradients.functional import IDGMGradient, functional_loss, idgm_grad

GAMMA = 0.3


def model_and_batches() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, [torch.randn(6, 4, dtype=torch.float64) + i for i in range(3)]


def squared(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().mean()


def checkpointed(model: nn.Sequential, *, use_reentrant: bool) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # as enable_input_require_grads of PEFT has it
        return model[2](checkpoint(model[:2], x, use_reentrant=use_reentrant)).square().mean()

    return loss


def idgm(model: nn.Module, batches: list[Any], loss: Callable[[Any], Tensor], **settings: Any) -> IDGMGradient:
    settings = {"gamma": GAMMA, "agreement": "variance", "buffers": {}} | settings
    return idgm_grad(functional_loss(model, loss), dict(model.named_parameters()), batches, **settings)


def assert_same(found: IDGMGradient, expected: IDGMGradient, **tolerance: float) -> None:
    for name, gradient in expected.gradient.items():
        torch.testing.assert_close(found.gradient[name], gradient, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


def scaling(factor: float | Tensor) -> Callable[[Tensor], None]:
    """A hook for once the gradient is in ``.grad``."""

    def hook(p: Tensor) -> None:
        p.grad.mul_(factor)

    return hook


def with_old_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Give some parameters a ``.grad``, which is to be there afterwards."""
    for p in list(model.parameters())[1:]:
        p.grad = torch.full_like(p, 9.0)
    return {name: p.grad for name, p in model.named_parameters()}


def assert_old_gradients(model: nn.Module, old: dict[str, Tensor | None]) -> None:
    assert all(p.grad is old[name] for name, p in model.named_parameters())
    assert all(bool((g == 9.0).all()) for g in old.values() if g is not None)


# ------------------------------------------------------------------------------------------------ first derivatives


def test_reentrant_checkpointing_is_measured_and_differenced_as_any_other():
    model, batches = model_and_batches()
    old, found, ways = with_old_gradients(model), [], {"hvp": "finite_difference", "compare": True}
    for use_reentrant in (True, False):
        loss = checkpointed(model, use_reentrant=use_reentrant)
        measured = gradient_alignment(model.parameters(), loss, batches)
        directions = [idgm(model, batches, loss, one_pass=one_pass, **ways).gradient for one_pass in (False, True)]
        found.append([measured.inner_product, measured.grad_norms, directions])
    torch.testing.assert_close(found[0], found[1])
    assert_old_gradients(model, old)


@pytest.mark.parametrize("agreement", ["inner_product", "variance", "cosine"])
def test_finite_differences_respect_a_hook_that_changes_grad(agreement: str):
    """A mask: what is left are the products of the parameters that are left."""
    model, batches = model_and_batches()
    model[0].weight.register_post_accumulate_grad_hook(scaling(0))
    found = idgm(model, batches, squared(model), hvp="finite_difference", agreement=agreement)
    assert not found.gradient["0.weight"].any()
    other, _ = model_and_batches()
    rest = {name: p for name, p in other.named_parameters() if name != "0.weight"}
    expected = idgm_grad(functional_loss(other, squared(other)), rest, batches, GAMMA, agreement, buffers={})
    assert_same(found, expected, rtol=1e-6, atol=1e-7)


def test_the_probe_sees_what_a_hook_leaves():
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    w.register_post_accumulate_grad_hook(scaling(torch.tensor([1.0, 0.0])))
    batches = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])]
    assert gradient_alignment([w], lambda x: (w * x).sum(), batches).inner_product == 3.0
    assert w.grad is None


def test_the_probe_lets_other_parameters_accumulate():
    w, other = (torch.tensor([1.0], requires_grad=True) for _ in range(2))
    other.grad = torch.tensor([5.0])
    gradient_alignment([w], lambda x: (w * x + other).sum(), [torch.tensor([3.0]), torch.tensor([1.0])])
    assert w.grad is None
    assert other.grad.tolist() == [7.0]


def test_grad_is_put_back_when_the_backward_pass_raises():
    w = torch.tensor([1.0], requires_grad=True)
    w.grad = old = torch.tensor([5.0])

    def fails(gradient: Tensor) -> Tensor:
        raise KeyError("hook")

    w.register_hook(fails)
    with pytest.raises(KeyError, match="hook"):
        gradient_of((w * 2).sum(), [w])
    assert w.grad is old


def test_by_tensors_that_were_computed_from_others():
    theta = torch.tensor([1.0, 2.0], requires_grad=True)
    hidden = theta * 2
    assert gradient_of(hidden.square().sum(), [hidden])[0].tolist() == [4.0, 8.0]
    assert theta.grad is None


def through_distributed_data_parallel() -> None:
    """Differences of gradients that DistributedDataParallel averages in one place, and the refusal of derivatives."""
    model, batches = model_and_batches()
    rank = torch.distributed.get_rank()
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    parts = [b[3 * rank : 3 * rank + 3] for b in batches]
    for one_pass in (False, True):
        found = idgm(model, parts, squared(wrapped), hvp="finite_difference", one_pass=one_pass)
        expected = idgm(model, batches, squared(model), one_pass=one_pass)
        assert_same(found, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"parameter '0.weight' .and of 3 more.*DistributedDataParallel"):
        idgm(model, parts, squared(wrapped), compare=True, keep_graphs=True)


def through_fully_shard() -> None:
    """What is measured is of whole gradients and not of this rank's shards."""
    model, batches = model_and_batches()
    expected = gradient_alignment(model.parameters(), squared(model), batches, pairs=True)
    fully_shard(model)
    found = gradient_alignment(model.parameters(), squared(model), batches, pairs=True)
    for name in ("inner_product", "cosine", "grad_norms", "cosines"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("through", [through_distributed_data_parallel, through_fully_shard])
def test_through_models_that_are_spread_over_ranks(through: Callable[[], None]):
    on_ranks(2, through)


# --------------------------------------------------------------------------------------------------- the comparison


WAYS: dict[str, dict[str, Any]] = {way: {"hvp": way} for way in ("reverse", "forward", "finite_difference")}
WAYS |= {way: {way: True} for way in ("keep_graphs", "one_pass")}


@pytest.mark.parametrize("way", [way for way in WAYS if way != "finite_difference"])
def test_a_hook_that_changes_grad_is_refused(way: str):
    model, batches = model_and_batches()
    old = with_old_gradients(model)
    model[2].bias.register_post_accumulate_grad_hook(scaling(0.5))
    message = "gradient of parameter '2.bias' by backward.. is another one than by torch.autograd.grad"
    with pytest.raises(ValueError, match=message):
        idgm(model, batches, squared(model), **WAYS[way], compare=True)
    assert_old_gradients(model, old)


def test_reentrant_checkpointing_between_parameters_is_explained():
    """torch itself refuses it there, and does not know what else there is."""
    model, batches = model_and_batches()

    def loss(x: Tensor) -> Tensor:
        return checkpoint(model[1:], model[0](x), use_reentrant=True).square().mean()

    with pytest.raises(RuntimeError, match=r'use hvp="finite_difference".*incompatible with .grad'):
        idgm(model, batches, loss, compare=True)


def test_hooks_of_tensors_count_in_double_backward_only():
    model, batches = model_and_batches()
    model[0].weight.register_hook(lambda g: g * 0.5)
    with pytest.raises(ValueError, match=r"'0.weight' by backward.*with hvp='forward' register_hook"):
        idgm(model, batches, squared(model), hvp="forward", compare=True)
    found = idgm(model, batches, squared(model), hvp="reverse", compare=True)
    assert_same(found, idgm(model, batches, squared(model), hvp="reverse", keep_graphs=True))


@pytest.mark.parametrize("way", WAYS)
def test_comparing_changes_nothing_and_evaluates_no_loss_again(way: str):
    """But for finite differences, of which two more products are taken."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 2))
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    batches, calls, found = [torch.randn(6, 4) + i for i in range(3)], [], []
    old, buffers = with_old_gradients(model), dict(model.named_buffers())

    def loss(x: Tensor) -> Tensor:
        calls.append(1)
        return nn.Sequential(*model)(x).square().mean()

    for compare in (False, True):
        torch.manual_seed(1)
        found.append(idgm(model, batches, loss, **WAYS[way], compare=compare, buffers=buffers))
        calls.append(0)
    assert_same(found[1], found[0])
    number = calls.index(0)
    assert len(calls) == 2 * (number + 1) + 4 * (way == "finite_difference")
    if way in ("keep_graphs", "one_pass"):
        assert number == 3
    assert_old_gradients(model, old)


@pytest.mark.parametrize(("structure", "name"), [("list", "0"), ("tensor", "0"), ("nested", "a/0")])
def test_the_parameter_is_named(structure: str, name: str):
    leaves = [torch.ones(1).requires_grad_(), torch.ones(2).requires_grad_()]
    leaves[0].register_post_accumulate_grad_hook(scaling(2))

    def loss(p: Any, x: float) -> Tensor:
        return torch.stack([(x * leaf).square().sum() for leaf in tree_leaves(p)]).sum()

    params = {"list": leaves, "tensor": leaves[0], "nested": {"a": leaves}}[structure]
    with pytest.raises(ValueError, match=f"gradient of parameter '{name}' by"):
        idgm_grad(loss, params, [1.0, 2.0], GAMMA, compare=True)


def test_nothing_is_compared_where_nothing_is_differentiated_again():
    model, batches = model_and_batches()
    model[2].bias.register_post_accumulate_grad_hook(scaling(0.0))
    found = idgm(model, batches, squared(model), gamma=0.0, compare=True)
    assert not found.gradient["2.bias"].any()
    assert found.gradient["0.bias"].any()


def test_what_counts_as_a_difference():
    one, zero = torch.ones(3), torch.zeros(3)
    rounding = one * (1 + 1e-6)
    for gradient, expected in [
        ([one, None], [rounding, None]),
        ([one, None], [one, zero]),
        ([one, zero], [one, None]),
        ([one, zero + 1e-6], [one, zero]),  # a bias before BatchNorm has nothing but rounding
        ([one.half()], [one.half() * 1.01]),
        ([one * torch.inf], [one * torch.inf]),  # a scale that overflows is another check's
        ([one * torch.nan], [one]),
        ([None], [None]),
    ]:
        check_backward(gradient, expected, "ab"[: len(expected)])
    for gradient, expected in [
        ([one, None], [one, one * 1e-3]),
        ([one, one], [one, None]),
        ([one, one], [one, one * 1.001]),
        ([one, 1e-3 * one], [one, 1.01e-3 * one]),
        ([one, one.to(torch.complex64)], [one, one * 1j]),
    ]:
        with pytest.raises(ValueError, match="gradient of parameter 'b' by"):
            check_backward(gradient, expected, "ab"[: len(expected)])


class Reversal(torch.autograd.Function):
    """A gradient reversal layer, as DANN has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def adversarial(model: nn.Sequential, weight: float) -> Callable[[Tensor], Tensor]:
    """Half of the features are to tell nothing, by a reversed gradient."""

    def loss(x: Tensor) -> Tensor:
        features = model[:2](x)
        reversed_loss = (model[2](Reversal.apply(features))[:, 1] - x.sum(dim=1)).square().mean()
        return model[2](features)[:, 0].square().mean() + weight * reversed_loss

    return loss


@pytest.mark.parametrize("settings", [{}, {"one_pass": True}, {"gamma": None}], ids=str)
def test_a_field_that_is_no_gradient_is_refused(settings: dict[str, Any]):
    model, batches = model_and_batches()
    with pytest.raises(ValueError, match=r"w\.Hv is .* and v\.Hw is .*gradient reversal"):
        idgm(model, batches, adversarial(model, 1.0), hvp="finite_difference", compare=True, **settings)
    idgm(model, batches, adversarial(model, 0.0), hvp="finite_difference", compare=True, **settings)


@pytest.mark.parametrize("seed", [10, 12, 14, 18])
def test_kinks_along_the_product_are_not_taken_for_such_a_field(seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    batches = [(torch.randn(2, 20) + 0.3 * i, torch.randint(5, (2,))) for i in range(3)]
    loss_fn = lambda b: nn.functional.cross_entropy(model(b[0]), b[1])  # noqa: E731
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):  # almost by heart: products are short
        optimizer.zero_grad()
        torch.stack([loss_fn(b) for b in batches]).sum().backward()
        optimizer.step()
    idgm(model, batches, loss_fn, hvp="finite_difference", compare=True)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.LeakyReLU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_kinks_and_rounding_are_not_taken_for_such_a_field(activation: type[nn.Module], dtype: torch.dtype, seed: int):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 64), activation(), nn.Linear(64, 64), activation(), nn.Linear(64, 5)).to(dtype)
    batches = [(torch.randn(16, 20).to(dtype) + 0.3 * i, torch.randint(5, (16,))) for i in range(3)]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    idgm(model, batches, loss, hvp="finite_difference", compare=True)
