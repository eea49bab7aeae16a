"""Any sequence of what users do under SmoothFish and IDGM agrees with their definitions by plain autograd."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from _feature_training import feature_net, through_file
from _models import assert_same_model, assert_same_state, loss_of, make_batches
from _reference import naive_idgm, smooth_fish_gradient
from _second_order import nothing_changes
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from torch_gradmatch import IDGM, GradMatch, SmoothFish

RTOL = 1e-6
INNER_LR = 0.05


class DirectionMachine(RuleBasedStateMachine):
    """Keeps a model under GradMatch, and another under the plain optimizer whose gradients an oracle works out."""

    @initialize(
        method=st.sampled_from(["SmoothFish", "symmetric", "inner_product", "variance", "cosine"]),
        adaptive=st.booleans(),
        track=st.booleans(),
        gamma=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        seed=st.integers(0, 2**16),
    )
    def build(self, method: str, adaptive: bool, track: bool, gamma: float, seed: int) -> None:
        self.name, self.adaptive, self.track, self.gamma = method, adaptive, track, gamma
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
        method: Any = IDGM(model, self.gamma, self.name, track_alignment=self.track) if not self.walks else None
        if self.walks:
            symmetric = self.name == "symmetric"
            method = SmoothFish(self.gamma, INNER_LR, model, track_alignment=self.track, symmetric=symmetric)
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

    @rule(bad=st.integers(0, 2), how=st.sampled_from(["nan", "inf", "raises"]))
    def meta_step_that_fails(self, bad: int, how: str) -> None:
        """Leaves everything as it was, gradients too."""

        def loss_fn(batch: Any) -> Tensor:
            loss = loss_of(self.model, batch)
            if batch[2] != bad:
                return loss
            if how == "raises":
                raise KeyError("label")
            return loss * float(how)

        error = KeyError if how == "raises" else ValueError
        with nothing_changes(self.model, self.optimizer), pytest.raises(error):
            self.optimizer.meta_step(loss_fn, make_batches(self.generator, 3))

    @rule(gamma=st.sampled_from([0.0, 0.2]), track=st.booleans())
    def change_settings(self, gamma: float, track: bool) -> None:
        self.gamma, self.track = gamma, track
        self.optimizer.method.gamma, self.optimizer.method.track_alignment = gamma, track

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
        pair = (self.model, self.optimizer)
        self.model, self.optimizer = copy.deepcopy(pair) if by == "deepcopy" else pickle.loads(pickle.dumps(pair))

    @invariant()
    def agrees(self) -> None:
        assert_same_model(self.model, self.oracle, rtol=RTOL)
        state = self.optimizer.optimizer.state_dict()["state"]
        assert_same_state(state, self.plain.state_dict()["state"], rtol=RTOL)


DirectionMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
TestDirection = DirectionMachine.TestCase
