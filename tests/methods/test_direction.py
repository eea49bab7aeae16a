"""GradMatch around the methods that hand it a direction: errors, states, copies, optimizers, schedules, hooks."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import _networks as networks
import pytest
import torch
from _models import assert_identical, assert_same_model
from _networks import Case, cross_entropy, make, mean_squared_error, regression
from _second_order import (
    DIRECTIONS,
    GAMMA,
    METHODS,
    assert_close,
    assert_same_buffers,
    flat,
    gradient_of,
    nothing_changes,
    plain_autograd,
    plain_smooth_fish,
    train,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish, fish_gamma

# --------------------------------------------------------------------------------------------------------------- errors


WRONG_LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "vector": (lambda value: value.expand(3), ValueError, r"batch 2 it has shape \(3,\)"),
    "float": (lambda value: float(value.detach()), TypeError, r"batch 2 it returned float"),
    "none": (lambda value: None, TypeError, r"batch 2 it returned NoneType"),
    "nan": (lambda value: value * float("nan"), ValueError, r"the loss of batch 2 is nan: nothing was changed"),
    "infinite": (lambda value: value / 0.0, ValueError, r"batch 2 is inf"),
    "detached": (lambda value: value.detach(), ValueError, r"batch 2 does not depend"),
}


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
@pytest.mark.parametrize("method", DIRECTIONS)
def test_a_wrong_loss_is_named_and_nothing_changes(method: str, wrong: str):
    spoil, error, message = WRONG_LOSSES[wrong]
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), DIRECTIONS[method](case.model))

    def healthy(batch: Any) -> Tensor:
        return case.loss(case.model, batch)

    optimizer.meta_step(healthy, case.batches)
    with nothing_changes(case.model, optimizer), pytest.raises(error, match=message):
        optimizer.meta_step(lambda b: spoil(healthy(b)) if b is case.batches[2] else healthy(b), case.batches)
    with nothing_changes(case.model, optimizer), pytest.raises(ValueError, match=r"at least 2 domains \(got 1\)"):
        optimizer.meta_step(healthy, case.batches[:1])
    with nothing_changes(case.model, optimizer), pytest.raises(ValueError, match="batches is empty"):
        optimizer.meta_step(healthy, [])
    with nothing_changes(case.model, optimizer), pytest.raises(ZeroDivisionError):
        optimizer.meta_step(lambda b: 1 / 0 if b is case.batches[2] else healthy(b), case.batches)
    oracle = copy.deepcopy(case)
    plain = GradMatch(AdamW(oracle.model.parameters()), DIRECTIONS[method](oracle.model))
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for network, opt in ((case, optimizer), (oracle, plain)):
        opt.meta_step(lambda b, n=network: n.loss(n.model, b), case.batches)
    assert_identical(case.model.state_dict(), oracle.model.state_dict())


@pytest.mark.parametrize("method", DIRECTIONS)
def test_a_failing_step_leaves_parameters_and_buffers(method: str):
    """The last thing that can go wrong: a hook or the wrapped optimizer itself raises."""
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), DIRECTIONS[method](case.model))

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = optimizer.register_step_pre_hook(fail)
    with nothing_changes(case.model, optimizer), pytest.raises(MemoryError):
        optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    handle.remove()
    optimizer.meta_step(lambda batch: case.loss(case.model, batch), case.batches)
    assert int(case.model[1].num_batches_tracked) == 3


@pytest.mark.parametrize("method", DIRECTIONS)
def test_a_loss_that_fails_while_lbfgs_has_moved_the_parameters(method: str):
    case = make(networks.batch_norm_eval)
    optimizer = GradMatch(
        torch.optim.LBFGS(case.model.parameters(), lr=0.1, max_iter=4), DIRECTIONS[method](case.model)
    )
    before = copy.deepcopy(case.model.state_dict())
    calls = []

    def loss(batch: Any) -> Tensor:
        calls.append(batch)
        if len(calls) > 11:  # beyond the first evaluation by any method
            raise MemoryError
        return case.loss(case.model, batch)

    with pytest.raises(MemoryError):
        optimizer.meta_step(loss, case.batches)
    assert_identical(case.model.state_dict(), before)


# ------------------------------------------------------------------------------------------------ GradMatch around them


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("method", DIRECTIONS)
def test_there_is_no_inner_loop(method: str):
    case, twin = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), DIRECTIONS[method](case.model))
    plain = AdamW(twin.model.parameters())
    train(case, optimizer)
    twin.model.load_state_dict(case.model.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.optimizer.state_dict()))
    with nothing_changes(case.model, optimizer):
        optimizer.rollback()
        with pytest.raises(RuntimeError, match=r"has no inner loop to close by interpolate\(\): call meta_step"):
            optimizer.interpolate()
    for (network, opt), index in itertools.product(((case, optimizer), (twin, plain)), range(3)):
        opt.zero_grad()
        network.loss(network.model, network.batches[index]).backward()
        opt.step()
    assert_identical(case.model.state_dict(), twin.model.state_dict())
    assert optimizer.inner_step == 0


@pytest.mark.parametrize("method", DIRECTIONS)
def test_resumes_bit_for_bit_from_a_file(method: str):
    case, resumed = make(networks.batch_norm_1d), make(networks.batch_norm_1d, seed=1)
    optimizer = GradMatch(AdamW(case.model.parameters(), lr=0.05), DIRECTIONS[method](case.model))
    train(case, optimizer)
    saved = through_file({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()})
    other = GradMatch(AdamW(resumed.model.parameters(), lr=7.0), DIRECTIONS[method](resumed.model))
    resumed.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(case, optimizer)
    train(Case(resumed.model, resumed.loss, case.batches), other)
    assert_identical(resumed.model.state_dict(), case.model.state_dict())
    assert_identical(other.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_model_and_optimizer_goes_on_alike(method: str, how: Callable[[Any], Any]):
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters(), lr=0.05), METHODS[method](case.model))
    train(case, optimizer)
    model, twin = how((case.model, optimizer))
    assert twin.method.model is model is not case.model
    train(case, optimizer)
    assert not torch.equal(model[0].weight, case.model[0].weight)
    train(Case(model, case.loss, case.batches), twin)
    assert_identical(model.state_dict(), case.model.state_dict())
    assert_identical(twin.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations(["IDGM", "SmoothFish", "Fish"], 2)))
def test_a_state_of_another_method_is_refused(saved: str, loaded: str):
    case, other = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters()), METHODS[saved](case.model))
    target = GradMatch(AdamW(other.model.parameters()), METHODS[loaded](other.model))
    train(case, optimizer)
    train(other, target)
    with (
        nothing_changes(other.model, target),
        pytest.raises(ValueError, match=f"saved by method '{saved}'; this optimizer uses {loaded}"),
    ):
        target.load_state_dict(optimizer.state_dict())


OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
)


@pytest.mark.parametrize("method", ["IDGM", "SmoothFish"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SparseAdam"])
def test_every_optimizer_takes_the_direction(name: str, method: str):
    """Three meta-iterations; the oracle puts the direction into ``.grad`` of a twin and steps the plain optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6, bias=name != "Muon"), nn.Tanh(), nn.Linear(6, 2, bias=name != "Muon")
    ).double()
    twin = copy.deepcopy(model)
    settings = {"lr": 0.05, "max_iter": 5, "line_search_fn": "strong_wolfe"} if name == "LBFGS" else {"lr": 0.05}
    wrapped, plain = (getattr(torch.optim, name)(m.parameters(), **settings) for m in (model, twin))
    optimizer = GradMatch(wrapped, IDGM(model, 0.1, "variance") if method == "IDGM" else SmoothFish(2.0, 0.1, model))

    def closure(batches: list[Any]) -> Tensor:
        if method == "IDGM":
            found = plain_autograd(twin, mean_squared_error, batches, 0.1, "variance")
            direction, value = flat(found.direction, twin), found.objective
        else:
            direction = plain_smooth_fish(twin, copy.deepcopy(twin), mean_squared_error, batches, 2.0, 0.1)
            matched = 2.0 * fish_gamma(0.1, len(batches))
            value = plain_autograd(twin, mean_squared_error, batches, matched, "inner_product").objective
        start = 0
        for p in twin.parameters():
            p.grad = direction[start : start + p.numel()].view_as(p).clone()
            start += p.numel()
        return value

    for _ in range(3):
        batches = regression(7, 4)
        optimizer.meta_step(lambda batch: mean_squared_error(model, batch), batches)
        if name == "LBFGS":
            plain.step(lambda batches=batches: closure(batches))
        else:
            closure(batches)
            plain.step()
        assert_same_model(model, twin, rtol=1e-7)


def test_sparse_adam_refuses_the_dense_direction_and_nothing_changes():
    case = make(networks.sparse_embedding)
    optimizer = GradMatch(torch.optim.SparseAdam(case.model.parameters()), IDGM(case.model, GAMMA))
    with nothing_changes(case.model, optimizer), pytest.raises(RuntimeError, match="does not support dense gradients"):
        train(case, optimizer, 1)


@pytest.mark.parametrize("method", METHODS)
def test_schedulers_count_meta_iterations(method: str):
    case = make(networks.batch_norm_1d)
    optimizer = GradMatch(AdamW(case.model.parameters(), lr=0.01), METHODS[method](case.model))
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=8)
    expected = lr_scheduler.OneCycleLR(AdamW([nn.Parameter(torch.zeros(1))], lr=0.01), max_lr=0.01, total_steps=8)
    for _ in range(5):
        train(case, optimizer, 1)
        scheduler.step()
        expected.optimizer.step()
        expected.step()
        assert optimizer.optimizer.param_groups[0]["lr"] == expected.get_last_lr()[0]


@pytest.mark.parametrize("method", DIRECTIONS)
def test_a_hook_clips_the_direction(method: str):
    case, twin = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.5), DIRECTIONS[method](case.model))
    unclipped = GradMatch(SGD(twin.model.parameters(), lr=0.0), DIRECTIONS[method](twin.model))
    norms = []

    def clip(opt: GradMatch, *_: Any) -> None:
        norms.append(nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 0.01))

    optimizer.register_step_pre_hook(clip)
    train(case, optimizer, 1)
    train(twin, unclipped, 1)
    direction = flat(gradient_of(twin.model), twin.model)
    torch.testing.assert_close(torch.stack(norms), direction.norm()[None])
    before = nn.utils.parameters_to_vector(twin.model.parameters()).detach()
    after = nn.utils.parameters_to_vector(case.model.parameters()).detach()
    assert_close(before - after, 0.5 * 0.01 * direction / direction.norm(), 1e-5)


def layerwise_cosine(gradients: list[dict[str, Tensor]]) -> Tensor:
    """A user's own agreement: mean cosine over pairs of domains, tensor by tensor."""
    cosines = []
    for name in gradients[0]:
        units = nn.functional.normalize(torch.stack([g[name].flatten() for g in gradients]), dim=1)
        gram = units @ units.T
        cosines.append((gram.sum() - gram.trace()) / (len(gradients) * (len(gradients) - 1)))
    return torch.stack(cosines).mean()


def log_volume(gradients: list[dict[str, Tensor]]) -> Tensor:
    """Another: minus the log-determinant of the matrix of inner products, which is small where they are parallel."""
    vectors = torch.stack([torch.cat([t.flatten() for t in g.values()]) for g in gradients])
    return -torch.logdet(vectors @ vectors.T + 0.1 * torch.eye(len(gradients), dtype=vectors.dtype))


@pytest.mark.parametrize("keep_graphs", [False, True], ids=["streaming", "kept"])
@pytest.mark.parametrize("hvp", ["reverse", "forward", "finite_difference"])
@pytest.mark.parametrize("agreement", [layerwise_cosine, log_volume])
def test_an_agreement_of_the_users_own(agreement: Callable[[Any], Tensor], hvp: str, keep_graphs: bool):
    case, oracle = make(networks.batch_norm_1d), make(networks.batch_norm_1d)
    oracle.model[0].bias.requires_grad_(False)  # before BatchNorm it has no effect: the cosine of two zeros
    case.model[0].bias.requires_grad_(False)
    method = IDGM(case.model, GAMMA, agreement, hvp=hvp, keep_graphs=keep_graphs)
    optimizer = GradMatch(SGD(case.model.parameters(), lr=0.0), method)
    train(case, optimizer, 1)
    expected = plain_autograd(oracle.model, case.loss, case.batches, GAMMA, agreement)
    assert_close(flat(gradient_of(case.model), case.model), flat(expected.direction, oracle.model), 1e-6)
    assert_same_buffers(case.model, oracle.model)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("network", ["ResNet", "Transformer"])
@pytest.mark.parametrize(
    "method",
    [
        lambda model: IDGM(model, 0.1, "variance"),
        lambda model: SmoothFish(1.0, 0.05, model),
        lambda model: SmoothFish(fish_gamma(0.05, 3), 0.05, model, symmetric=True),
        lambda model: Fish(0.5, model=model),
    ],
    ids=["IDGM", "SmoothFish", "SmoothFish, symmetric", "Fish"],
)
def test_one_loop_trains_by_every_method(network: str, method: Callable[[nn.Module], Any]):
    torch.manual_seed(0)
    if network == "ResNet":
        model: nn.Module = networks.ResNet(width=4, blocks=1)
        labels = torch.randint(0, 3, (9,))
        patterns = torch.randn(3, 3, 8, 8)
        batches = [(patterns[labels] + 0.3 * torch.randn(9, 3, 8, 8) + 0.2 * d, labels) for d in range(3)]
    else:
        model = networks.SequenceClassifier(dropout=0.1)
        batches = []
        for _ in range(3):
            tokens = torch.randint(0, 11, (16, 6))
            batches.append((tokens, tokens[:, 0] % 3))
    optimizer = GradMatch(AdamW(model.parameters(), lr=0.01), method(model))
    losses = []
    for _ in range(10 if network == "ResNet" else 40):
        report = optimizer.meta_step(lambda batch: cross_entropy(model, batch), batches)
        losses.append(float(report.losses.mean()))
    assert losses[-1] < 0.5 * losses[0], losses
    model.eval()
    with torch.no_grad():
        accuracy = torch.cat([model(x).argmax(dim=1) == y for x, y in batches]).double().mean()
    assert accuracy > 0.6
