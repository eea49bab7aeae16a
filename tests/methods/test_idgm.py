"""IDGM through ``meta_step``: the theorem that ties it to Fish, strength, divergence, errors."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from _models import FeatureNet, assert_identical, assert_same_model, loss_of, make_batches
from _reference import naive_idgm
from test_fish import expected_fish_direction, quartic_losses
from torch import Tensor, nn

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, SmoothFish, fish_gamma, meta_batches


def expected_idgm_direction(losses: list[Any], theta: Tensor, gamma: float) -> Tensor:
    """What a step of SGD with IDGM takes off the parameters, through the public API."""
    model = nn.Module()
    model.register_parameter("theta", nn.Parameter(theta.clone()))
    method = IDGM(model, gamma, "inner_product")
    optimizer = GradMatch(torch.optim.SGD(model.parameters(), lr=1.0), method)
    optimizer.meta_step(lambda loss: loss(model.theta), losses)
    return theta - model.theta.detach()


@pytest.mark.parametrize("domains", [2, 3, 4])
def test_fish_is_idgm_with_fish_gamma_to_second_order(domains: int):
    """Mean over all orders of (theta - theta~)/(alpha S) against IDGM's direction: halve alpha, quarter the error."""
    generator = torch.Generator().manual_seed(domains)
    losses = quartic_losses(generator, domains=domains, size=5, scale=0.4)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    errors = []
    for halvings in range(3, 7):  # down to 1/64
        alpha = 0.5**halvings
        exact = expected_idgm_direction(losses, theta, fish_gamma(alpha, domains))
        errors.append(float((expected_fish_direction(losses, theta, alpha) - exact).norm()))
    ratios = [coarse / fine for coarse, fine in itertools.pairwise(errors)]
    assert all(3.7 <= ratio <= 4.3 for ratio in ratios), ratios


def errors_of_two_groups(order: str, seed: int, domains: int, wrong: float = 1.0) -> tuple[list[float], list[float]]:
    """Errors of one walk of Fish, and of the mean of two, against IDGM, while alpha is halved; over its term's size.

    Two groups of a ``DomainBatchSampler`` over domains of one batch each, both from the same parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    features = 0.4 * torch.randn(domains * 6, 5, generator=generator, dtype=torch.float64)
    targets = torch.randn(domains * 6, generator=generator, dtype=torch.float64)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(features, targets)
    sampler = DomainBatchSampler([i // 6 for i in range(len(data))], batch_size=6, order=order, seed=seed)
    loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)
    groups = [group for _ in range(2) for group in meta_batches(loader, domains)]
    model = nn.Module()
    model.register_parameter("theta", nn.Parameter(theta.clone()))

    def loss_fn(batch: Any) -> Tensor:
        return (torch.tanh(batch[0] @ model.theta) - batch[1]).square().mean()

    def displacement(optimizer: GradMatch, batches: Any) -> Tensor:
        optimizer.meta_step(loss_fn, batches)
        moved = theta - model.theta.detach()
        with torch.no_grad():
            model.theta.copy_(theta)
        return moved

    def of_idgm(gamma: float) -> Tensor:
        method = IDGM(model, gamma, "inner_product")
        return displacement(GradMatch(torch.optim.SGD(model.parameters(), lr=1.0), method), groups[0])

    single, mean = [], []
    for halvings in range(5, 9):
        alpha = 0.5**halvings
        fish = GradMatch(torch.optim.SGD(model.parameters(), lr=alpha), Fish(meta_lr=1.0))
        walks = [displacement(fish, group) / (alpha * domains) for group in groups]
        exact = of_idgm(wrong * fish_gamma(alpha, domains))
        size = float((exact - of_idgm(0.0)).norm()) / alpha
        single.append(float((walks[0] - exact).norm()) / size)
        mean.append(float((sum(walks) / 2 - exact).norm()) / size)
    return single, mean


@pytest.mark.parametrize("domains", [2, 3, 8])
def test_a_walk_and_its_reverse_follow_the_exact_direction(domains: int):
    """One pair of groups in flip-flop order: halve alpha, quarter the error; that of one walk only halves."""
    single, mean = errors_of_two_groups("flipflop", domains % 3, domains)
    assert all(3.7 <= coarse / fine <= 4.4 for coarse, fine in itertools.pairwise(mean)), mean
    assert all(1.8 <= coarse / fine <= 2.2 for coarse, fine in itertools.pairwise(single)), single
    assert mean[-1] < 0.1 * single[-1]


@pytest.mark.parametrize(("order", "wrong"), [("random", 1.0), ("flipflop", 2.0)])
def test_two_walks_in_random_order_do_not_nor_with_another_gamma(order: str, wrong: float):
    """So the test above can fail."""
    mean = errors_of_two_groups(order, seed=0, domains=5, wrong=wrong)[1]
    assert mean[-2] / mean[-1] == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("wrong", [2.0, -1.0], ids=["double", "opposite"])
def test_with_another_gamma_the_theorem_fails(wrong: float):
    """So the test above can fail: the error is then of first order and only halves."""
    generator = torch.Generator().manual_seed(0)
    losses = quartic_losses(generator, domains=3, size=5)
    theta = torch.randn(5, generator=generator, dtype=torch.float64)
    errors = []
    for alpha in (1 / 256, 1 / 512):
        ordinary = expected_idgm_direction(losses, theta, 0.0)
        exact = ordinary + wrong * (expected_idgm_direction(losses, theta, fish_gamma(alpha, 3)) - ordinary)
        errors.append(float((expected_fish_direction(losses, theta, alpha) - exact).norm()))
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


# -------------------------------------------------------------------------------------------------------- strength


def features(seed: int = 0) -> FeatureNet:
    return FeatureNet(torch.Generator().manual_seed(seed)).eval()  # the same function wherever it is called


def wrap(model: nn.Module, *, lr: float = 0.0, **settings: Any) -> GradMatch[IDGM]:
    return GradMatch(torch.optim.SGD(model.parameters(), lr=lr), IDGM(model, **settings))


def mean_and_matching(model: nn.Module, batches: list[Any]) -> tuple[Tensor, Tensor]:
    """The mean gradient, and what was added to it."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    mean = torch.stack([loss_of(model, b) for b in batches]).mean()
    mean_gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(mean, parameters)])
    return mean_gradient, torch.cat([p.grad.reshape(-1) for p in parameters]) - mean_gradient


@pytest.mark.parametrize("scaled", [False, True], ids=["no scaler", "GradScaler"])
@pytest.mark.parametrize("agreement", ["variance", "inner_product", "cosine"])
def test_by_default_matching_is_at_first_a_tenth_as_long_as_the_mean_gradient(agreement: str, scaled: bool):
    model, batches = features(), make_batches(torch.Generator().manual_seed(1), 3)
    optimizer = wrap(model, **({} if agreement == "variance" else {"agreement": agreement}))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
    report = optimizer.meta_step(partial(loss_of, model), batches, scaler)
    mean, matching = mean_and_matching(model, batches)
    assert float(matching.norm() / mean.norm()) == pytest.approx(0.1, rel=1e-6)

    assert report.gamma is not None
    assert report.scalars("train/")["train/gamma"] == report.gamma
    wanted = [p for p in model.parameters() if p.requires_grad]
    expected = naive_idgm(wanted, [partial(loss_of, model, b) for b in batches], report.gamma, agreement)[1]
    for p, g in zip(wanted, expected, strict=True):
        if p.grad is not None:
            torch.testing.assert_close(p.grad, g, rtol=1e-6, atol=1e-9)


def test_the_gamma_found_is_kept_and_saved(tmp_path: Any):
    """Other batches want another one; so a new optimizer finds another, and one that goes on has the old one."""
    model, batches = features(), make_batches(torch.Generator().manual_seed(1), 12)
    optimizer = wrap(model, lr=0.1)
    loss_fn = partial(loss_of, model)
    found = optimizer.meta_step(loss_fn, batches[:3]).gamma
    assert optimizer.meta_step(loss_fn, batches[3:6]).gamma == found
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    resumed, anew = wrap(model), wrap(model)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert copy.deepcopy(optimizer).last_meta_step.gamma == found
    assert resumed.meta_step(loss_fn, batches[6:9]).gamma == found
    assert anew.meta_step(loss_fn, batches[6:9]).gamma != pytest.approx(found, rel=1e-2)


def test_a_new_strength_finds_gamma_anew_and_a_given_gamma_is_used():
    model, batches = features(), make_batches(torch.Generator().manual_seed(1), 3)
    optimizer = wrap(model)
    found = optimizer.meta_step(partial(loss_of, model), batches).gamma
    optimizer.method.strength = 0.5
    assert optimizer.meta_step(partial(loss_of, model), batches).gamma == pytest.approx(5 * found)
    optimizer.method.gamma = 0.25
    assert optimizer.meta_step(partial(loss_of, model), batches).gamma == 0.25
    optimizer.method.gamma = None
    assert optimizer.meta_step(partial(loss_of, model), batches).gamma == pytest.approx(5 * found)


def test_a_meta_iteration_that_fails_or_has_nothing_to_match_finds_no_gamma():
    model, batches = features(), make_batches(torch.Generator().manual_seed(1), 3)
    optimizer = wrap(model)
    before = optimizer.state_dict()["gradmatch"]

    def fail(*_: Any) -> None:
        raise MemoryError

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        optimizer.meta_step(partial(loss_of, model), batches)
    handle.remove()
    assert optimizer.state_dict()["gradmatch"] == before
    assert optimizer.meta_step(lambda b: model.out.weight.square().sum(), batches).gamma == 0.0
    found = optimizer.meta_step(partial(loss_of, model), batches).gamma
    assert found == wrap(model).meta_step(partial(loss_of, model), batches).gamma > 0


# ------------------------------------------------------------------------------------------------------ divergence


def bowl(gamma: float, lr: float = 0.1, **settings: Any) -> tuple[nn.Module, GradMatch, Any, list[float]]:
    """L_i = (w - t_i)^2 / 2 for t = 1, 3: unbounded below if gamma > 1/2, since GIP = (w - 1)(w - 3)."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = wrap(model, lr=lr, gamma=gamma, **{"agreement": "inner_product"} | settings)
    return model, optimizer, lambda t: (model.weight.squeeze() - t).square() / 2, [1.0, 3.0]


def train_until_refused(optimizer: GradMatch, loss_fn: Any, targets: list[float]) -> None:
    """Raise what the first meta-iteration that is refused raises, which has changed nothing."""
    w = optimizer.param_groups[0]["params"][0]
    for _ in range(100):
        before = copy.deepcopy((w.detach(), w.grad, optimizer.state_dict()))
        try:
            optimizer.meta_step(loss_fn, targets)
        except RuntimeError:
            assert_identical((w.detach(), optimizer.state_dict()), before[::2])
            assert (w.grad is before[1] is None) or torch.equal(w.grad, before[1])
            raise


@pytest.mark.parametrize(("gamma", "start"), [(20.0, 0.0), (8.0, 2.1)], ids=["at once", "from a harmless start"])
def test_an_exploding_inner_product_is_an_error_before_anything_changes(gamma: float, start: float):
    """At w = 2 the domains' gradients are opposed, and their inner product grows from there without end."""
    model, optimizer, loss_fn, targets = bowl(gamma)
    nn.init.constant_(model.weight, start)
    message = (
        r"training diverges: the matching term is .* and the mean loss .*earlier ones may have led here, so go back to "
        rf"a checkpoint\. Lower gamma \(it is {gamma:g}\), or use agreement='variance', which is bounded"
    )
    with pytest.raises(RuntimeError, match=message):
        train_until_refused(optimizer, loss_fn, targets)
    assert bool(torch.isfinite(model.weight).all())
    optimizer.method.gamma = 0.0
    optimizer.meta_step(loss_fn, targets)


def test_a_stable_gamma_is_not_suspected():
    """gamma = 0.4: bounded below, minimum of the mean loss kept. At first the loss is 0 and the matching term 1.2."""
    model, optimizer, loss_fn, targets = bowl(gamma=0.4, lr=0.5)
    for _ in range(120):
        report = optimizer.meta_step(lambda t: loss_fn(t) - 2.5, targets)
    assert model.weight.item() == pytest.approx(2.0, abs=1e-4)
    assert float(report.losses.mean()) == pytest.approx(-2.0)


def test_the_bounded_agreements_are_not_suspected():
    for agreement in ("variance", "cosine"):
        model, optimizer, loss_fn, targets = bowl(gamma=1e6, lr=1e-9, agreement=agreement)
        optimizer.meta_step(loss_fn, targets)
        assert bool(torch.isfinite(model.weight).all())


def test_nonfinite_gradients_are_an_error_that_names_gamma_and_variance():
    model, optimizer, _, _ = bowl(gamma=1.0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"IDGM diverged.*gamma=1\..*agreement='variance'"):
        optimizer.meta_step(lambda t: model.weight.abs().sqrt().sum() + t, [torch.ones(1), torch.ones(1)])
    assert_identical(model.state_dict(), before)
    assert model.weight.grad is None


def test_the_check_can_be_turned_off():
    model, optimizer, loss_fn, targets = bowl(gamma=20.0, nonfinite="ignore")
    for _ in range(80):
        optimizer.meta_step(loss_fn, targets)
    assert not bool(torch.isfinite(model.weight).all())


# --------------------------------------------------------------------------------------------------- the other calls


def test_a_closure_that_lbfgs_calls_again():
    """Against LBFGS on the exact objective written by hand; buffers move once for each domain."""
    model = FeatureNet(torch.Generator().manual_seed(0))
    oracle = copy.deepcopy(model)
    settings: dict[str, Any] = {"lr": 0.1, "max_iter": 4, "line_search_fn": "strong_wolfe"}
    optimizer = GradMatch(torch.optim.LBFGS(model.parameters(), **settings), IDGM(model, 0.2, "variance"))
    plain = torch.optim.LBFGS(oracle.parameters(), **settings)
    wanted = [p for p in oracle.parameters() if p.requires_grad]
    batches = make_batches(torch.Generator().manual_seed(1), 3)
    buffers_after: dict[str, Tensor] = {}

    def closure() -> Tensor:
        objective, direction = naive_idgm(wanted, [lambda b=b: loss_of(oracle, b) for b in batches], 0.2, "variance")
        for p, g in zip(wanted, direction, strict=True):
            p.grad = g
        if not buffers_after:
            buffers_after.update({n: b.clone() for n, b in oracle.named_buffers()})
        return objective

    optimizer.meta_step(lambda b: loss_of(model, b), batches)
    plain.step(closure)
    for name, buffer in oracle.named_buffers():
        buffer.copy_(buffers_after[name])
    assert_same_model(model, oracle, rtol=1e-8)


def test_evaluations_of_one_step_draw_the_same_random_numbers():
    """LBFGS on a network with dropout: a deterministic objective, and afterwards the generator has moved once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    batches = [torch.randn(6, 4, dtype=torch.float64) + i for i in range(3)]
    seen = []

    def loss_fn(x: Tensor) -> Tensor:
        seen.append(torch.rand(()).item())
        return (model(x) - 1).square().mean()

    settings: dict[str, Any] = {"lr": 0.5, "max_iter": 5, "line_search_fn": "strong_wolfe"}
    for method in (IDGM(model, 0.1, "variance"), SmoothFish(1.0, 0.01, model)):
        optimizer = GradMatch(torch.optim.LBFGS(model.parameters(), **settings), method)
        seen.clear()
        torch.manual_seed(1)
        optimizer.meta_step(loss_fn, batches)
        next_number = torch.rand(())
        assert len(seen) > 10
        assert len(set(seen)) == 3  # one for each domain
        torch.manual_seed(1)
        for x in batches:
            loss_fn(x)
        assert torch.equal(torch.rand(()), next_number)


def test_malformed_state_dicts_are_refused():
    model = features()
    optimizer = wrap(model)
    state = optimizer.state_dict()
    for bad in ("1.0", 1, (), {"first": "1.0"}):
        spoilt = {**state, "gradmatch": {**state["gradmatch"], "memory": bad}}
        with pytest.raises(ValueError, match="the state dict's 'memory' is malformed"):
            optimizer.load_state_dict(spoilt)


# --------------------------------------------------------------------------------------------- models and parameters


def test_bad_models():
    with pytest.raises(TypeError, match=r"model should be a torch\.nn\.Module.* \(got list\)"):
        IDGM([nn.Linear(1, 1)])  # type: ignore[arg-type]
    inside, outside = nn.Linear(1, 1), nn.Linear(2, 1)
    parameters = [*inside.parameters(), *outside.parameters()]
    with pytest.raises(
        ValueError, match=r"parameter number 2 of the optimizer, of shape \(1, 2\), is not in the model Linear"
    ):
        GradMatch(torch.optim.SGD(parameters, lr=0.1), IDGM(inside))
    frozen = nn.Linear(1, 1).requires_grad_(False)
    optimizer = GradMatch(torch.optim.SGD(frozen.parameters(), lr=0.1), IDGM(frozen))
    with pytest.raises(ValueError, match="no parameter of the optimizer requires a gradient"):
        optimizer.meta_step(lambda x: frozen(x).sum(), [torch.ones(1, 1)] * 2)


def test_parameters_added_later():
    model = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    optimizer = GradMatch(torch.optim.SGD(model[0].parameters(), lr=0.1), IDGM(model, 0.1))
    before = model[1].weight.detach().clone()

    def loss_fn(x: Tensor) -> Tensor:
        return model[1](model[0](x)).square().sum()

    optimizer.meta_step(loss_fn, [torch.ones(1, 1), torch.ones(2, 1)])
    assert torch.equal(model[1].weight, before)
    assert model[1].weight.grad is None
    optimizer.add_param_group({"params": model[1].parameters()})
    optimizer.meta_step(loss_fn, [torch.ones(1, 1), torch.ones(2, 1)])
    assert not torch.equal(model[1].weight, before)
