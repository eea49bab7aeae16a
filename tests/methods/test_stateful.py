"""Any sequence of what users do to a GradMatch agrees with slow loops: Algorithm 1 on clones, and plain autograd."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from _feature_training import feature_net, through_file
from _models import FeatureNet, assert_same_model, assert_same_state, loss_of, make_batches
from _reference import ReferenceFish, naive_idgm, smooth_fish_gradient
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.03, "amsgrad": True},
    "RMSprop": {"lr": 0.01, "centered": True},
}
SETTINGS = st.fixed_dictionaries({
    "meta_lr": st.sampled_from([0.1, 0.5, 0.8, 1.0]),
    "inner_state": st.sampled_from(["carry", "reset"]),
    "buffers": st.sampled_from(["interpolate", "latest"]),
    "meta_dtype": st.sampled_from([None, torch.float64]),
    "inner_steps": st.sampled_from([None, 1, 3]),
    "track_alignment": st.booleans(),
})  # fmt: skip
LATE = "per_domain"  # these parameters join by add_param_group


def duplicate(pair: Any, by: str) -> Any:
    return copy.deepcopy(pair) if by == "deepcopy" else pickle.loads(pickle.dumps(pair))


class FishMachine(RuleBasedStateMachine):
    """Keeps a model under GradMatch and an oracle side by side."""

    @initialize(name=st.sampled_from(sorted(OPTIMIZERS)), chosen=SETTINGS, seed=st.integers(0, 2**16))
    def build(self, name: str, chosen: dict[str, Any], seed: int) -> None:
        self.name, self.settings, self.inner_steps = name, chosen, chosen["inner_steps"]
        # In single precision with slow weights in double, the run is not as near the oracle's as in double.
        self.dtype, self.rtol = (torch.float32, 1e-3) if chosen["meta_dtype"] else (torch.float64, 1e-7)
        self.late_group = False
        self.learning_rate = OPTIMIZERS[name]["lr"]
        self.generator = torch.Generator().manual_seed(seed)
        self.model = self.new_model(seed)
        of_oracle = {k: v for k, v in chosen.items() if k not in ("inner_steps", "track_alignment")}
        self.oracle = ReferenceFish(copy.deepcopy(self.model), self.optimizer_for, **of_oracle)
        self.optimizer = self.wrap(self.model)
        self.scheduler = ExponentialLR(self.optimizer, 0.9)
        self.steps = self.steps_since_scheduled = 0
        self.attempted = False

    def new_model(self, seed: int) -> FeatureNet:
        return FeatureNet(torch.Generator().manual_seed(seed), dtype=self.dtype)

    def draw(self, count: int = 1) -> list[Any]:
        drawn = make_batches(self.generator, count, dtype=self.dtype)
        return [(x, y, (self.steps + i) % 3) for i, (x, y, _) in enumerate(drawn)]

    def took_a_step(self) -> None:
        self.steps += 1
        self.steps_since_scheduled += 1
        if self.oracle.steps_taken == self.inner_steps:
            self.oracle.interpolate()

    def optimizer_for(self, model: nn.Module) -> torch.optim.Optimizer:
        late = {p for n, p in model.named_parameters() if n.startswith(LATE)}
        groups = [{"params": [p for p in model.parameters() if p not in late]}]
        if self.late_group:
            groups.append({"params": list(model.get_submodule(LATE).parameters())})
        return getattr(torch.optim, self.name)(groups, **{**OPTIMIZERS[self.name], "lr": self.learning_rate})

    def wrap(self, model: nn.Module) -> GradMatch[Fish]:
        return GradMatch(self.optimizer_for(model), Fish(model=model, **self.settings))

    def schedule(self, last: dict[str, Any]) -> None:
        self.scheduler = ExponentialLR(self.optimizer, 0.9)
        self.scheduler.load_state_dict(last)
        self.steps_since_scheduled = 0

    @rule(forwards=st.integers(1, 2))
    def step(self, forwards: int) -> None:
        """One optimizer step, on one batch or on the accumulated gradients of two."""
        batches = self.draw(forwards)
        self.optimizer.zero_grad()
        for batch in batches:
            loss_of(self.model, batch).backward()
        self.optimizer.step()
        self.oracle.step(lambda m: sum(loss_of(m, batch) for batch in batches))
        self.took_a_step()

    @rule()
    def step_that_fails(self) -> None:
        """The wrapped optimizer raises before it has moved anything; the domain was not visited."""
        (batch,) = self.draw()

        def fail(*_: Any) -> None:
            raise MemoryError("no memory")

        handle = self.optimizer.optimizer.register_step_pre_hook(fail)
        self.optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        with pytest.raises(MemoryError):
            self.optimizer.step()
        handle.remove()
        self.oracle.attempt(lambda m: loss_of(m, batch), counts=False)
        self.attempted = True

    @rule(overflows=st.booleans())
    def step_by_a_grad_scaler(self, overflows: bool) -> None:
        """A step whose gradients overflow is skipped, and the domain was visited."""
        (batch,) = self.draw()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        self.optimizer.zero_grad()
        scaler.scale(loss_of(self.model, batch) * (float("inf") if overflows else 1.0)).backward()
        scaler.step(self.optimizer)
        scaler.update()
        if overflows:
            self.oracle.attempt(lambda m: loss_of(m, batch), counts=True)
            self.attempted = True
        else:
            self.oracle.step(lambda m: loss_of(m, batch))
        self.took_a_step()

    @rule()
    def look_at_the_slow_weights(self) -> None:
        with self.optimizer.slow_weights():
            assert_same_model(self.model, self.oracle.model, rtol=self.rtol)
            if self.oracle.inner_model is not None:
                loss_of(self.model, self.draw()[0])  # moves buffers, which is lost

    @rule(gradients=st.booleans(), functional=st.booleans(), evaluates=st.booleans())
    def forward_only(self, gradients: bool, functional: bool, evaluates: bool) -> None:
        """``update_bn``, a teacher by ``functional_call``: between two inner loops what it moves is the user's."""
        x, _, domain = self.draw()[0]
        with torch.set_grad_enabled(gradients):
            for model in (self.model, self.oracle.current_model):
                model.train(not evaluates)
                parameters = dict(model.named_parameters()) if functional else {}
                torch.func.functional_call(model, parameters, (x, domain))
                model.train()

    @precondition(lambda self: self.optimizer.inner_step > 0)
    @rule()
    def interpolate(self) -> None:
        self.optimizer.interpolate()
        self.oracle.interpolate()

    @rule()
    def rollback(self) -> None:
        self.optimizer.rollback()
        self.oracle.end()

    @precondition(lambda self: self.oracle.inner_model is None)
    @rule(count=st.integers(1, 4))
    def meta_step(self, count: int) -> None:
        batches = self.draw(self.inner_steps or count)
        self.optimizer.meta_step(lambda b: loss_of(self.model, b), batches)
        for batch in batches:
            self.oracle.step(lambda m, b=batch: loss_of(m, b))
        self.oracle.interpolate()
        self.steps += len(batches)

    @precondition(lambda self: self.oracle.inner_model is None)
    @rule()
    def weight_surgery(self) -> None:
        """Between inner loops the user overwrites parameters and buffers."""
        noise = [torch.randn(t.shape, generator=self.generator, dtype=torch.float64) for t in self.model.parameters()]
        with torch.no_grad():
            for model in (self.model, self.oracle.model):
                for parameter, change in zip(model.parameters(), noise, strict=True):
                    if parameter.requires_grad:
                        parameter.add_(0.01 * change.to(self.dtype))
                model.norm.running_mean.add_(0.5)

    @rule()
    def save_and_load(self) -> None:
        state = through_file({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        last = self.scheduler.state_dict()
        self.model = self.new_model(0)
        self.optimizer = self.wrap(self.model)
        self.model.load_state_dict(state["model"])
        self.schedule(last)
        self.optimizer.load_state_dict(state["optimizer"])

    @rule(by=st.sampled_from(["deepcopy", "pickle"]))
    def copy_all(self, by: str) -> None:
        last = self.scheduler.state_dict()
        self.model, self.optimizer = duplicate((self.model, self.optimizer), by)
        self.schedule(last)

    @precondition(lambda self: not self.late_group)
    @rule()
    def add_param_group(self) -> None:
        base = OPTIMIZERS[self.name]["lr"]

        def late(model: nn.Module) -> dict[str, Any]:
            parameters = list(model.get_submodule(LATE).parameters())
            return {"params": parameters, "lr": self.learning_rate, "initial_lr": base}

        self.late_group = True
        self.optimizer.add_param_group(late(self.model))
        self.scheduler.base_lrs.append(base)
        if self.oracle.inner_optimizer is not None:
            self.oracle.inner_optimizer.add_param_group(late(self.oracle.current_model))

    @precondition(lambda self: self.steps_since_scheduled > 0)
    @rule()
    def scheduler_step(self) -> None:
        self.scheduler.step()
        self.learning_rate *= 0.9
        if self.oracle.inner_optimizer is not None:
            for group in self.oracle.inner_optimizer.param_groups:
                group["lr"] *= 0.9

    @invariant()
    def agrees(self) -> None:
        assert_same_model(self.model, self.oracle.current_model, rtol=self.rtol)
        assert self.optimizer.inner_step == self.oracle.steps_taken
        for group in self.optimizer.param_groups:
            assert abs(group["lr"] - self.learning_rate) < 1e-12
        if self.steps > 0 or self.attempted:
            state = self.optimizer.optimizer.state_dict()["state"]
            assert_same_state(state, self.oracle.optimizer_state, rtol=self.rtol)


FishMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestFish = FishMachine.TestCase


RTOL = 1e-6
INNER_LR = 0.05


class DirectionMachine(RuleBasedStateMachine):
    """Keeps a model under GradMatch, and another under the plain optimizer whose gradients an oracle works out."""

    @initialize(
        method=st.sampled_from(["SmoothFish", "symmetric", "inner_product", "variance", "cosine"]),
        adaptive=st.booleans(),
        track=st.booleans(),
        gamma=st.sampled_from([0.0, 0.1, 0.2, 1.0]),
        seed=st.integers(0, 2**16),
    )
    def build(self, method: str, adaptive: bool, track: bool, gamma: float, seed: int) -> None:
        self.name, self.adaptive, self.track = method, adaptive, track
        self.share = 0.2 if method in ("inner_product", "symmetric") else 1.0  # unbounded: at gamma 1 it diverges
        self.gamma = self.share * gamma
        self.generator = torch.Generator().manual_seed(seed)
        self.model = feature_net(seed)
        self.oracle = copy.deepcopy(self.model)
        self.plain = self.optimizer_for(self.oracle)
        self.optimizer = self.wrap(self.model)

    def optimizer_for(self, model: nn.Module) -> Optimizer:
        return Adam(model.parameters(), lr=0.01) if self.adaptive else SGD(model.parameters(), lr=0.02, momentum=0.9)

    @property
    def walks(self) -> bool:
        return self.name in ("SmoothFish", "symmetric")

    def wrap(self, model: nn.Module) -> GradMatch[Any]:
        symmetric, track = self.name == "symmetric", self.track
        method: Any = SmoothFish(self.gamma, INNER_LR, model, track_alignment=track, symmetric=symmetric)
        if not self.walks:  # the inner product is unbounded: it may be large, which is not the law here
            method = IDGM(model, self.gamma, self.name, track_alignment=track, nonfinite="ignore")
        return GradMatch(self.optimizer_for(model), method)

    def direction(self, batches: list[Any]) -> list[Tensor | None]:
        """The gradient that the plain optimizer is to get; the oracle's buffers move once for each domain."""
        if self.walks:
            symmetric = self.name == "symmetric"
            return smooth_fish_gradient(self.oracle, loss_of, batches, self.gamma, INNER_LR, symmetric=symmetric)
        trained = [p for p in self.oracle.parameters() if p.requires_grad]
        losses = [lambda b=b: loss_of(self.oracle, b) for b in batches]
        found = naive_idgm(trained, losses, self.gamma, self.name)[1]
        visited = {b[2] for b in batches}
        unreached = {id(p) for i, p in enumerate(self.oracle.per_domain) if i not in visited}
        unreached |= {id(self.oracle.unused), id(self.oracle.empty)}
        return [None if id(p) in unreached else g for p, g in zip(trained, found, strict=True)]

    @rule(count=st.integers(2, 4), scaled=st.booleans())
    def meta_step(self, count: int, scaled: bool) -> None:
        batches = make_batches(self.generator, count)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
        report = self.optimizer.meta_step(lambda b: loss_of(self.model, b), batches, scaler)
        assert (report.cosine is not None) is (self.track or self.name == "cosine")
        trained = [p for p in self.oracle.parameters() if p.requires_grad]
        for p, g in zip(trained, self.direction(batches), strict=True):
            p.grad = g
        self.plain.step()

    @rule()
    def ordinary_step(self) -> None:
        (batch,) = make_batches(self.generator, 1)
        for model, optimizer in ((self.model, self.optimizer), (self.oracle, self.plain)):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()

    @rule(gamma=st.sampled_from([0.0, 0.2]), track=st.booleans())
    def change_settings(self, gamma: float, track: bool) -> None:
        self.gamma, self.track = self.share * gamma, track
        self.optimizer.method.gamma, self.optimizer.method.track_alignment = self.gamma, track

    @rule()
    def update_bn_in_the_slow_weights(self) -> None:
        """There are none: what happens in the block stays."""
        (batch,) = make_batches(self.generator, 1)
        with self.optimizer.slow_weights(), torch.no_grad():
            loss_of(self.model, batch)
            loss_of(self.oracle, batch)

    @rule()
    def save_and_load(self) -> None:
        state = through_file({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
        self.model = feature_net()
        self.optimizer = self.wrap(self.model)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    @rule(by=st.sampled_from(["deepcopy", "pickle"]))
    def copy_all(self, by: str) -> None:
        self.model, self.optimizer = duplicate((self.model, self.optimizer), by)

    @invariant()
    def agrees(self) -> None:
        assert_same_model(self.model, self.oracle, rtol=RTOL)
        state = self.optimizer.optimizer.state_dict()["state"]
        assert_same_state(state, self.plain.state_dict()["state"], rtol=RTOL)


DirectionMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestDirection = DirectionMachine.TestCase
