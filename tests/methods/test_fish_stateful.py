"""Any sequence of what users do to a GradMatch agrees with the clone-per-iteration loop of Algorithm 1."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from _feature_training import through_file
from _models import FeatureNet, assert_same_model, assert_same_state, loss_of, make_batches
from _reference import ReferenceFish
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from torch_gradmatch import Fish, GradMatch

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

    @rule(gradients=st.booleans(), functional=st.booleans())
    def forward_only(self, gradients: bool, functional: bool) -> None:
        """``update_bn``, a teacher by ``functional_call``: between two inner loops what it moves is the user's."""
        x, _, domain = self.draw()[0]
        with torch.set_grad_enabled(gradients):
            for model in (self.model, self.oracle.current_model):
                if functional:
                    torch.func.functional_call(model, dict(model.named_parameters()), (x, domain))
                else:
                    model(x, domain)

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
    @rule(bad=st.integers(0, 2), value=st.sampled_from([float("nan"), -float("inf")]))
    def meta_step_with_a_loss_that_is_not_finite(self, bad: int, value: float) -> None:
        """Leaves everything as it was."""
        batches = self.draw(self.inner_steps or 3)
        bad = bad % len(batches)

        def loss_fn(batch: Any) -> Tensor:
            return loss_of(self.model, batch) * (value if batch is batches[bad] else 1.0)

        with pytest.raises(ValueError, match=f"the loss of batch {bad} is"):
            self.optimizer.meta_step(loss_fn, batches)

    @rule()
    def evaluate(self) -> None:
        (batch,) = self.draw()
        for model in (self.model, self.oracle.current_model):
            model.eval()
            loss_of(model, batch)
            model.train()

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
        pair = (self.model, self.optimizer)
        last = self.scheduler.state_dict()
        self.model, self.optimizer = copy.deepcopy(pair) if by == "deepcopy" else pickle.loads(pickle.dumps(pair))
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
