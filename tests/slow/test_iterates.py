"""What an optimizer keeps in parameter space moves by the meta-update, too, and is restored with the parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import torch
from _layout import in_format_3
from _models import assert_identical, assert_same_state
from _models import domain_loss as loss_of
from _models import small_network as network
from _reference import fish_by_hand
from _wrapped import ITERATES, Averaging, NeedsAModel
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from torch_gradmatch import Fish, GradMatch, SmoothFish


def found_in(names: tuple[str, ...]) -> Callable[[Optimizer, Tensor], dict[str, Tensor]]:
    return lambda optimizer, p: {name: optimizer.state[p][name] for name in names if name in optimizer.state.get(p, {})}


def wrapped(name: str, model: nn.Module, **settings: Any) -> GradMatch[Fish]:
    return GradMatch(ITERATES[name][0](list(model.parameters())), Fish(0.3, **settings))


def everything(model: nn.Module, optimizer: GradMatch[Any]) -> dict[str, Any]:
    """Parameters and the wrapped optimizer's state, copied."""
    inner = getattr(optimizer.optimizer, "optimizer", None)
    states = [optimizer.optimizer.state, {} if inner is None else inner.state]
    return copy.deepcopy(
        {
            "parameters": list(model.parameters()),
            "states": [[dict(state[p]) for p in model.parameters() if p in state] for state in states],
        }
    )


@pytest.mark.parametrize("call", ["step", "meta_step"])
@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("name", ITERATES)
def test_they_walk_and_are_interpolated_with_the_parameters(name: str, inner_state: str, call: str):
    build, names = ITERATES[name]
    model, plain = network(), network()
    optimizer = wrapped(name, model, inner_state=inner_state, inner_steps=3)
    by_hand = build(list(plain.parameters()))
    for _ in range(4):
        if inner_state == "reset":
            by_hand = build(list(plain.parameters()))
        fish_by_hand(by_hand, [lambda d=d: loss_of(plain, d) for d in range(3)], 0.3, found_in(names))
        if call == "meta_step":
            optimizer.meta_step(lambda d: loss_of(model, d), range(3))
        else:
            for d in range(3):
                optimizer.zero_grad()
                loss_of(model, d).backward()
                optimizer.step()
        for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-14)
            ours = found_in(names)(optimizer.optimizer, p)
            assert set(ours) == set(names)
            assert_same_state(ours, found_in(names)(by_hand, expected), rtol=1e-12)


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW", "ScheduleFreeWrapper"])
def test_eval_after_training_shows_the_interpolated_average(name: str):
    """Schedule-free evaluates at x, where y = (1 - beta) z + beta x: interpolated like y and z, whatever meta_lr."""
    build, names = ITERATES[name]
    model, plain = network(), network()
    optimizer, by_hand = wrapped(name, model), build(list(plain.parameters()))
    for _ in range(5):
        optimizer.meta_step(lambda d: loss_of(model, d), range(3))
        fish_by_hand(by_hand, [lambda d=d: loss_of(plain, d) for d in range(3)], 0.3, found_in(names))
    y = copy.deepcopy(list(model.parameters()))
    optimizer.eval()
    by_hand.eval()
    for p, expected, before in zip(model.parameters(), plain.parameters(), y, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(p, before)
    optimizer.train()
    for p, before in zip(model.parameters(), y, strict=True):
        torch.testing.assert_close(p, before, rtol=1e-12, atol=1e-14)


@pytest.mark.large
def test_schedule_free_inside_fish_learns_as_well_whatever_the_fraction():
    """At the point to train and at the point to evaluate, after as many meta-iterations times meta_lr."""
    losses = []
    for meta_lr in (1.0, 0.1):
        model = network()
        inner = pytorch_optimizer.ScheduleFreeSGD(model.parameters(), lr=0.3)
        optimizer = GradMatch(inner, Fish(meta_lr))
        optimizer.train()
        for _ in range(round(150 / meta_lr)):
            optimizer.meta_step(lambda d, m=model: loss_of(m, d), range(3))
        with torch.no_grad():
            at_y = sum(float(loss_of(model, d)) for d in range(3))
            optimizer.eval()
            losses.append((at_y, sum(float(loss_of(model, d)) for d in range(3))))
    for at_y, at_x in losses[1:]:
        assert at_y < 1.05 * losses[0][0]
        assert at_x < 1.05 * losses[0][1]


# --------------------------------------------------------------------------------------------------------- restoring


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("name", ITERATES)
def test_rollback_restores_them(name: str, inner_state: str):
    names = ITERATES[name][1]
    model = network()
    optimizer = wrapped(name, model, inner_state=inner_state)
    for trained in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        iterates = [copy.deepcopy(found_in(names)(optimizer.optimizer, p)) for p in model.parameters()]
        for d in range(2):
            optimizer.zero_grad()
            loss_of(model, d).backward()
            optimizer.step()
        optimizer.rollback()
        for p, value, at_first in zip(model.parameters(), before, iterates, strict=True):
            assert torch.equal(p, value)
            now = found_in(names)(optimizer.optimizer, p)
            # What the abandoned steps made, or made anew after a reset, begins at the slow weights.
            fresh = not at_first or inner_state == "reset"
            assert_identical(now, dict.fromkeys(names, value) if fresh else at_first)
        if not trained:
            optimizer.meta_step(lambda d: loss_of(model, d), range(3))


@pytest.mark.parametrize("name", ITERATES)
def test_a_meta_step_that_fails_leaves_no_trace(name: str):
    model = network()
    optimizer = wrapped(name, model)
    for _ in range(2):
        before = everything(model, optimizer)
        groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        with pytest.raises(ValueError, match="nan"):
            optimizer.meta_step(lambda d: loss_of(model, d) * (float("nan") if d == 2 else 1.0), range(3))
        assert_identical(everything(model, optimizer), before)
        assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        optimizer.meta_step(lambda d: loss_of(model, d), range(3))


@pytest.mark.parametrize("name", ["ScheduleFreeSGD", "ScheduleFreeAdamW"])
def test_slow_weights_with_eval_inside_shows_x_of_the_slow_point(name: str):
    model = network()
    optimizer = wrapped(name, model)
    optimizer.meta_step(lambda d: loss_of(model, d), range(3))
    slow_x = copy.deepcopy(model)
    other = copy.deepcopy((model, optimizer))
    other[1].eval()
    slow_x.load_state_dict(other[0].state_dict())
    for d in range(2):
        optimizer.zero_grad()
        loss_of(model, d).backward()
        optimizer.step()
    before = everything(model, optimizer)
    for forgets_train in (False, True):
        with optimizer.slow_weights():
            optimizer.eval()
            assert_same_state(model.state_dict(), slow_x.state_dict(), rtol=1e-12)
            if not forgets_train:
                optimizer.train()
        assert_identical(everything(model, optimizer), before)
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    optimizer.step()  # it is in training mode again
    optimizer.interpolate()


def test_switching_the_mode_in_the_middle_of_an_inner_loop_is_refused_where_it_goes_wrong():
    model = network()
    optimizer = wrapped("ScheduleFreeSGD", model)
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.eval()
    for call in (optimizer.interpolate, lambda: optimizer.slow_weights().__enter__()):
        with pytest.raises(
            RuntimeError, match=r"switched to another mode .* \('train_mode'\).*optimizer.train\(\) first"
        ):
            call()
    optimizer.train()
    optimizer.interpolate()
    optimizer.eval()  # between two inner loops it is the user's affair
    with optimizer.slow_weights():
        pass


class Strict(pytorch_optimizer.ScheduleFreeSGD):
    """Steps in training mode only, as the optimizers of ``schedulefree`` do."""

    def step(self, closure: Any = None) -> Any:
        if not self.param_groups[0]["train_mode"]:
            raise ValueError("not in train mode when step is called")
        return super().step(closure)


@pytest.mark.parametrize("trained", [False, True])
def test_a_step_refused_after_eval_leaves_no_slow_weights_of_the_other_mode(trained: bool):
    """Who forgets train() is told so by the optimizer, calls it and goes on as if nothing had been."""
    model, plain = network(), network()
    pair = [(m, GradMatch(Strict(m.parameters(), lr=0.5), Fish(0.3))) for m in (model, plain)]
    for _, optimizer in pair:
        optimizer.train()
    for m, optimizer in pair:
        if trained:
            optimizer.meta_step(lambda d, m=m: loss_of(m, d), range(3))
        optimizer.eval()
    optimizer = pair[0][1]
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="train mode"):
        optimizer.step()
    for m, optimizer in pair:
        optimizer.train()
        for d in range(3):
            optimizer.zero_grad()
            loss_of(m, d).backward()
            optimizer.step()
        optimizer.interpolate()
    assert_identical(everything(*pair[0]), everything(*pair[1]))


def test_a_switch_that_a_step_changes_is_no_mode():
    class Begins(Averaging):
        begun = False

        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.begun = True
            self.param_groups[0]["begun"] = True

    model = network()
    optimizer = GradMatch(Begins(model.parameters()), Fish(0.5))
    optimizer.param_groups[0]["begun"] = False
    optimizer.optimizer.begun = False
    optimizer.meta_step(lambda d: loss_of(model, d), range(3))
    assert optimizer.optimizer.begun


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_iterate_that_is_not_finite_is_refused(bad: float):
    model = network()
    optimizer = wrapped("Averaging", model)
    loss_of(model, 0).backward()
    optimizer.step()
    first = next(iter(model.parameters()))
    optimizer.optimizer.state[first]["polyak"][0, 0] = bad
    with pytest.raises(RuntimeError, match="the state of Averaging holds NaN or infinity"):
        optimizer.interpolate()
    optimizer.rollback()
    assert torch.isfinite(optimizer.optimizer.state[first]["polyak"]).all()


# ------------------------------------------------------------------------------------------------------- checkpoints


def through_file(state: Any, path: Any) -> Any:
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("steps", range(1, 7))
@pytest.mark.parametrize("name", ITERATES)
def test_training_resumes_bit_for_bit(name: str, steps: int, inner_state: str, tmp_path: Any):
    def train(model: nn.Module, optimizer: GradMatch[Any], begin: int, end: int) -> None:
        for i in range(begin, end):
            optimizer.zero_grad()
            loss_of(model, i % 3).backward()
            optimizer.step()

    model = network()
    optimizer = wrapped(name, model, inner_steps=3, inner_state=inner_state)
    train(model, optimizer, 0, steps)
    saved = through_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    resumed = network(seed=7)
    after = wrapped(name, resumed, inner_steps=3, inner_state=inner_state)
    resumed.load_state_dict(saved["model"])
    after.load_state_dict(saved["optimizer"])
    assert_identical(after.state_dict(), optimizer.state_dict())
    train(model, optimizer, steps, 9)
    train(resumed, after, steps, 9)
    assert_identical(everything(resumed, after), everything(model, optimizer))


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", ITERATES)
def test_copies_go_their_own_way(name: str, through: Any):
    model = network()
    optimizer = wrapped(name, model)
    if name in ("Lookahead", "ScheduleFreeWrapper"):  # which leave out what they need
        with pytest.raises(AttributeError, match="has no attribute 'defaults'"):
            through(optimizer.optimizer)
        return
    loss_of(model, 0).backward()
    optimizer.step()
    twin, copied = through((model, optimizer))
    for m, o in ((model, optimizer), (twin, copied)):
        o.zero_grad()
        loss_of(m, 1).backward()
        o.step()
        o.interpolate()
        o.meta_step(lambda d, m=m: loss_of(m, d), range(3))
    assert_identical(everything(twin, copied), everything(model, optimizer))


def test_slow_iterates_of_another_optimizer_are_refused():
    model = network()
    optimizer = wrapped("ScheduleFreeSGD", model)
    optimizer.meta_step(lambda d: loss_of(model, d), range(3))
    loss_of(model, 0).backward()
    optimizer.step()
    state = in_format_3(optimizer)
    for spoil, message in (
        (lambda s: s.pop("slow_iterates"), "'slow_iterates' is missing"),
        (
            lambda s: s["slow_iterates"][0].update(slow_w=torch.zeros(4, 3)),
            "(?s)holds slow iterates .* do not exist here",
        ),
        (
            lambda s: s["slow_iterates"][0].update(slow_z=torch.zeros(2)),
            r"slow iterate of parameter 0 has shape \(2,\)",
        ),
        (lambda s: s.update(average_weights=["much"]), "'average_weights' is malformed"),
        (lambda s: s["slow_iterates"].update({9: {"slow_z": torch.zeros(2)}}), "slow iterate of parameter 9"),
        (lambda s: s.update(held_iterates={"slow_z": [0, 0, 2]}), "has a position of 'slow_z' twice"),
    ):
        spoilt = copy.deepcopy(state)
        spoil(spoilt["gradmatch"])
        with pytest.raises(ValueError, match=message):
            wrapped("ScheduleFreeSGD", network()).load_state_dict(spoilt)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_state_from_before_they_were_followed_loads_between_two_inner_loops_only(steps: int):
    model = network()
    optimizer = wrapped("ScheduleFreeSGD", model, inner_steps=3)
    for d in range(steps):
        optimizer.zero_grad()
        loss_of(model, d).backward()
        optimizer.step()
    state = in_format_3(optimizer)
    state["gradmatch"]["version"] = 2
    for name in ("slow_iterates", "average_weights", "optimizers"):
        del state["gradmatch"][name]
    resumed = wrapped("ScheduleFreeSGD", network(), inner_steps=3)
    if steps == 3:
        resumed.load_state_dict(state)
        return
    with pytest.raises(ValueError, match="saved by an earlier version in the middle of an inner loop"):
        resumed.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------- others


def test_the_wrapped_optimizer_never_sees_the_copies():
    model = network()
    optimizer = wrapped("Averaging", model)
    loss_of(model, 0).backward()
    optimizer.step()
    for p in model.parameters():
        assert set(optimizer.optimizer.state[p]) == {"polyak"}
        assert set(optimizer.state[p]) == {"polyak", "slow"}  # it did not exist when the inner loop began
    optimizer.interpolate()
    loss_of(model, 0).backward()
    optimizer.step()
    assert all(set(optimizer.state[p]) == {"polyak", "slow", "slow_polyak"} for p in model.parameters())


def test_one_that_tells_its_iterates_by_itself_is_believed():
    model, plain = network(), network()
    inner = NeedsAModel(model.parameters(), model)
    inner.gradmatch_iterates = ("polyak",)
    optimizer, by_hand = GradMatch(inner, Fish(0.3)), Averaging(plain.parameters())
    for _ in range(3):
        optimizer.meta_step(lambda d: loss_of(model, d), range(3))
        fish_by_hand(by_hand, [lambda d=d: loss_of(plain, d) for d in range(3)], 0.3, found_in(("polyak",)))
        for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert_same_state(inner.state[p]["polyak"], by_hand.state[expected]["polyak"], rtol=1e-12)


def test_a_parameter_unfrozen_in_the_middle_has_iterates_from_then_on():
    model = network()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    optimizer = wrapped("Averaging", model)
    before = first.detach().clone()
    for d in range(3):
        first.requires_grad_(d > 0)
        optimizer.zero_grad()
        loss_of(model, d).backward()
        optimizer.step()
    walked = first.detach().clone(), optimizer.optimizer.state[first]["polyak"].clone()
    optimizer.interpolate()
    torch.testing.assert_close(first.detach(), before + 0.3 * (walked[0] - before))
    torch.testing.assert_close(optimizer.optimizer.state[first]["polyak"], before + 0.3 * (walked[1] - before))


def test_other_methods_take_whole_steps_of_it():
    """SmoothFish gives schedule-free one gradient in each meta-iteration: nothing to interpolate, nothing refused."""
    model, plain = network(), network()
    inner = pytorch_optimizer.ScheduleFreeSGD(model.parameters(), lr=0.3)
    optimizer = GradMatch(inner, SmoothFish(0.0, 0.1))
    optimizer.train()
    by_hand = pytorch_optimizer.ScheduleFreeSGD(plain.parameters(), lr=0.3)
    by_hand.train()
    for _ in range(3):
        optimizer.meta_step(lambda d: loss_of(model, d), range(3))
        by_hand.zero_grad()
        (sum(loss_of(plain, d) for d in range(3)) / 3).backward()
        by_hand.step()
    assert_same_state(model.state_dict(), plain.state_dict(), rtol=1e-12)


def test_methods_of_the_wrapped_optimizer_can_be_called_and_nothing_else():
    optimizer = wrapped("Lookahead", network())
    optimizer.backup_and_load_cache()
    optimizer.clear_and_load_backup()
    for name in ("alpha", "nothing", "_numel", "optimizer_that_is_not_there"):
        assert not hasattr(optimizer, name)
    with pytest.raises(AttributeError, match="'GradMatch' object has no attribute 'train'"):
        GradMatch(SGD([nn.Parameter(torch.ones(1))], lr=0.1)).train()
