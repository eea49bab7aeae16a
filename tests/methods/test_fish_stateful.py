"""Any sequence of what users do to a GradMatch agrees with the clone-per-iteration loop of Algorithm 1."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import hypothesis.strategies as st
import torch
from _models import FeatureNet, assert_same_model, assert_same_state, loss_of, make_batches
from _reference import ReferenceFish
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from torch_gradmatch import Fish, GradMatch

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.03, "amsgrad": True},
    "RMSprop": {"lr": 0.01, "centered": True},
}
LATE = "per_domain"  # these parameters join by add_param_group


class FishMachine(RuleBasedStateMachine):
    """Keeps a model under GradMatch and an oracle side by side."""

    @initialize(
        name=st.sampled_from(sorted(OPTIMIZERS)),
        inner_state=st.sampled_from(["carry", "reset"]),
        buffers=st.sampled_from(["interpolate", "latest"]),
        meta_lr=st.sampled_from([0.1, 0.5, 0.8, 1.0]),
        track=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def build(self, name: str, inner_state: str, buffers: str, meta_lr: float, track: bool, seed: int) -> None:
        self.name = name
        self.late_group = False
        self.learning_rate = OPTIMIZERS[name]["lr"]
        self.settings = {
            "meta_lr": meta_lr, "inner_state": inner_state, "buffers": buffers, "track_alignment": track
        }  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.model = FeatureNet(torch.Generator().manual_seed(seed))
        self.oracle = ReferenceFish(
            copy.deepcopy(self.model), self.optimizer_for, meta_lr, inner_state=inner_state, buffers=buffers
        )
        self.optimizer = self.wrap(self.model)
        self.scheduler = ExponentialLR(self.optimizer, 0.9)
        self.steps = 0
        self.steps_since_scheduled = 0

    def optimizer_for(self, model: nn.Module) -> torch.optim.Optimizer:
        named = dict(model.named_parameters())
        groups = [{"params": [p for n, p in named.items() if not n.startswith(LATE)]}]
        if self.late_group:
            groups.append({"params": [p for n, p in named.items() if n.startswith(LATE)]})
        options = {**OPTIMIZERS[self.name], "lr": self.learning_rate}
        return getattr(torch.optim, self.name)(groups, **options)

    def wrap(self, model: nn.Module) -> GradMatch:
        return GradMatch(self.optimizer_for(model), Fish(model=model, **self.settings))

    def schedule(self, last: dict[str, Any]) -> None:
        self.scheduler = ExponentialLR(self.optimizer, 0.9)
        self.scheduler.load_state_dict(last)
        self.steps_since_scheduled = 0

    @rule()
    def step(self) -> None:
        (batch,) = make_batches(self.generator, 1)
        batch = (batch[0], batch[1], self.steps % 3)
        self.optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        self.optimizer.step()
        self.oracle.step(lambda m: loss_of(m, batch))
        self.steps += 1
        self.steps_since_scheduled += 1

    @precondition(lambda self: self.optimizer.inner_step > 0)
    @rule()
    def interpolate(self) -> None:
        self.optimizer.interpolate()
        self.oracle.interpolate()

    @rule()
    def rollback(self) -> None:
        self.optimizer.rollback()
        self.oracle.end()

    @precondition(lambda self: self.optimizer.inner_step == 0 and self.oracle.inner_model is None)
    @rule(count=st.integers(1, 4))
    def meta_step(self, count: int) -> None:
        batches = make_batches(self.generator, count)
        self.optimizer.meta_step(lambda b: loss_of(self.model, b), batches)
        for batch in batches:
            self.oracle.step(lambda m, b=batch: loss_of(m, b))
        self.oracle.interpolate()
        self.steps += count

    @rule()
    def forward_only(self) -> None:
        """A training-mode forward pass moves BatchNorm statistics before any step."""
        (batch,) = make_batches(self.generator, 1)
        if self.oracle.inner_model is None:
            self.oracle.begin()
        loss_of(self.model, batch)
        loss_of(self.oracle.current_model, batch)

    @rule()
    def evaluate(self) -> None:
        (batch,) = make_batches(self.generator, 1)
        for model in (self.model, self.oracle.current_model):
            model.eval()
            loss_of(model, batch)
            model.train()

    @precondition(lambda self: self.oracle.inner_model is None)
    @rule()
    def weight_surgery(self) -> None:
        """Between inner loops the user overwrites parameters and buffers."""
        noise = [torch.randn(t.shape, generator=self.generator, dtype=torch.float64) for t in self.model.parameters()]
        for model in (self.model, self.oracle.model):
            with torch.no_grad():
                for parameter, change in zip(model.parameters(), noise, strict=True):
                    if parameter.requires_grad:
                        parameter.add_(0.01 * change)
                model.norm.running_mean.add_(0.5)

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        last = self.scheduler.state_dict()
        self.model = FeatureNet(torch.Generator().manual_seed(0))
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
        def late(model: nn.Module) -> dict[str, Any]:
            parameters = [p for n, p in model.named_parameters() if n.startswith(LATE)]
            return {"params": parameters, "lr": self.learning_rate, "initial_lr": OPTIMIZERS[self.name]["lr"]}

        self.late_group = True
        self.optimizer.add_param_group(late(self.model))
        self.scheduler.base_lrs.append(OPTIMIZERS[self.name]["lr"])
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
        assert_same_model(self.model, self.oracle.current_model, rtol=1e-7)
        for group in self.optimizer.param_groups:
            assert abs(group["lr"] - self.learning_rate) < 1e-12
        if self.steps > 0:
            state = self.optimizer.optimizer.state_dict()["state"]
            assert_same_state(state, self.oracle.optimizer_state, rtol=1e-7)


FishMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestFish = FishMachine.TestCase
