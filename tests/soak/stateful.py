"""The stateful tests of the methods over random settings, optimizers and seeds, for 10,000 steps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import hypothesis.strategies as st
import torch
from _models import FeatureNet, assert_same_model, assert_same_state, loss_of, make_batches
from _reference import ReferenceFish
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from methods.test_direction_stateful import DirectionMachine
from methods.test_fish_stateful import LATE, FishMachine
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

STEPS = 10_000
IN_A_CASE = 100
LENGTH = 25  # of one sequence


class Several:
    """Some plain optimizers, stepped one after the other: what a list of optimizers is to do."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for one in self.optimizers for group in one.param_groups]

    @property
    def state(self) -> Any:
        return Entries(self.optimizers)

    def zero_grad(self) -> None:
        for one in self.optimizers:
            one.zero_grad()

    def step(self) -> None:
        for one in self.optimizers:
            one.step()

    def state_dict(self) -> dict[str, Any]:
        joined: dict[int, Any] = {}
        first = 0
        for one in self.optimizers:
            joined |= {first + i: entry for i, entry in one.state_dict()["state"].items()}
            first += sum(len(group["params"]) for group in one.param_groups)
        return {"state": joined}


class Entries:
    """The entries of all, each where it belongs."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.states = {p: one.state for one in optimizers for group in one.param_groups for p in group["params"]}

    def __contains__(self, p: object) -> bool:
        return p in self.states and p in self.states[p]  # type: ignore[index]

    def __getitem__(self, p: torch.Tensor) -> Any:
        return self.states[p][p]

    def __setitem__(self, p: torch.Tensor, entry: Any) -> None:
        self.states[p][p] = entry


class Counting(RuleBasedStateMachine):
    """Counts the rules that were carried out."""

    counts: ClassVar[dict[str, int]] = {}

    @invariant()
    def count(self) -> None:
        self.counts["rules"] += 1  # once also after `build`


# By name, whether single precision with slow weights in double is near enough to the oracle, and what it is built with.
OPTIMIZERS: dict[str, tuple[bool, dict[str, Any]]] = {
    "SGD": (True, {"momentum": 0.9}),
    "nesterov": (True, {"momentum": 0.7, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (True, {"amsgrad": True}),
    "AdamW": (True, {"weight_decay": 0.1}),
    "NAdam": (False, {}),
    "RAdam": (False, {}),
    "Adagrad": (False, {}),
    "Adamax": (False, {}),
    "ASGD": (False, {"t0": 3}),
    "RMSprop": (True, {"centered": True}),
    "LBFGS": (False, {"max_iter": 3, "history_size": 3}),
    "several": (True, {}),
}

CAST = ("NAdam", "ASGD")  # torch's load_state_dict casts what they keep in single precision to a parameter's dtype
NO_LATE = ("LBFGS", "Adagrad")  # torch's take no further group, or make no state for it


def build_optimizer(name: str, options: dict[str, Any], groups: list[dict[str, Any]]) -> Optimizer:
    kind = {"nesterov": "SGD"}.get(name, name)
    made: Optimizer = getattr(torch.optim, kind)(groups, **options)
    return made


class FishSoak(FishMachine, Counting):
    """More optimizers, lists of two, and settings from a range."""

    @initialize(
        name=st.sampled_from(sorted(OPTIMIZERS)),
        inner_state=st.sampled_from(["carry", "reset"]),
        buffers=st.sampled_from(["interpolate", "latest"]),
        meta_lr=st.one_of(st.floats(0.01, 1.0), st.just(1.0)),
        inner_steps=st.sampled_from([None, 1, 2, 3, 5]),
        lr=st.sampled_from([0.1, 0.03, 0.003]),
        wide=st.booleans(),
        track=st.sampled_from([False, True, "pairs"]),
        seed=st.integers(0, 2**31),
    )
    def build(
        self,
        name: str,
        inner_state: str,
        buffers: str,
        meta_lr: float,
        inner_steps: int | None,
        lr: float,
        wide: bool,
        track: Any,
        seed: int,
    ) -> None:
        self.name = name
        wide = wide and OPTIMIZERS[name][0]
        self.dtype, self.rtol = (torch.float32, 1e-3) if wide else (torch.float64, 1e-6)
        meta_dtype = torch.float64 if wide else None
        self.late_group = False
        self.first_learning_rate = self.learning_rate = lr
        self.settings = {
            "meta_lr": meta_lr, "inner_state": inner_state, "buffers": buffers, "track_alignment": track,
            "inner_steps": inner_steps, "meta_dtype": meta_dtype,
        }  # fmt: skip
        self.inner_steps = inner_steps
        self.generator = torch.Generator().manual_seed(seed)
        self.model = self.new_model(seed)
        oracle = FeatureNet(torch.Generator().manual_seed(seed), dtype=self.dtype)
        self.oracle = ReferenceFish(oracle, self.plain_optimizer_for, meta_lr, inner_state, buffers, meta_dtype)
        self.optimizer = self.wrap(self.model)
        self.scheduler = ExponentialLR(self.optimizer, 0.9)
        self.steps = 0
        self.attempted = False
        self.steps_since_scheduled = 0

    @property
    def needs_closure(self) -> bool:
        return self.name == "LBFGS"

    def options(self) -> dict[str, Any]:
        return {**OPTIMIZERS[self.name][1], "lr": self.learning_rate}

    def listed(self, model: nn.Module) -> list[Optimizer]:
        named = dict(model.named_parameters())
        some = [p for n, p in named.items() if not n.startswith(("inp", "tied"))]
        rest = [p for n, p in named.items() if n.startswith(("inp", "tied"))]
        lr = self.learning_rate
        return [torch.optim.Adam(some, lr=lr), torch.optim.SGD(rest, lr=lr, momentum=0.5)]

    def optimizer_for(self, model: nn.Module) -> Any:
        if self.name == "several":
            return self.listed(model)
        named = dict(model.named_parameters())
        early = [p for n, p in named.items() if not n.startswith(LATE) or self.needs_closure]
        groups: list[dict[str, Any]] = [{"params": early}]
        if self.late_group:
            groups.append({"params": [p for n, p in named.items() if n.startswith(LATE)]})
        return build_optimizer(self.name, self.options(), groups)

    def plain_optimizer_for(self, model: nn.Module) -> Any:
        built = self.optimizer_for(model)
        return Several(built) if isinstance(built, list) else built

    def wrap(self, model: nn.Module) -> GradMatch[Any]:
        return GradMatch(self.optimizer_for(model), Fish(model=model, **self.settings))

    @rule()
    def step(self) -> None:
        (batch,) = self.draw()
        if not self.needs_closure:
            self.optimizer.zero_grad()
            loss_of(self.model, batch).backward()
            self.optimizer.step()
        else:

            def closure() -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = loss_of(self.model, batch)
                loss.backward()
                return loss

            self.optimizer.step(closure)
        self.oracle.step(lambda m: loss_of(m, batch))
        self.took_a_step()

    @precondition(lambda self: not self.needs_closure and self.name != "several")
    @rule()
    def step_that_fails(self) -> None:
        FishMachine.step_that_fails(self)

    @precondition(lambda self: self.name not in CAST)
    @rule()
    def save_and_load(self) -> None:
        FishMachine.save_and_load(self)

    @precondition(lambda self: not self.needs_closure)
    @rule(overflows=st.booleans())
    def step_by_a_grad_scaler(self, overflows: bool) -> None:
        FishMachine.step_by_a_grad_scaler(self, overflows)

    @precondition(lambda self: not self.late_group and self.name not in ("several", *NO_LATE))
    @rule()
    def add_param_group(self) -> None:
        def late(model: nn.Module) -> dict[str, Any]:
            parameters = [p for n, p in model.named_parameters() if n.startswith(LATE)]
            return {"params": parameters, "lr": self.learning_rate, "initial_lr": self.first_learning_rate}

        self.late_group = True
        self.optimizer.add_param_group(late(self.model))
        self.scheduler.base_lrs.append(self.first_learning_rate)
        if self.oracle.inner_optimizer is not None:
            self.oracle.inner_optimizer.add_param_group(late(self.oracle.current_model))

    @precondition(lambda self: self.oracle.inner_model is None)
    @rule(meta_lr=st.floats(0.01, 1.0))
    def change_settings(self, meta_lr: float) -> None:
        """Between two inner loops."""
        self.optimizer.method.meta_lr = self.oracle.meta_lr = self.settings["meta_lr"] = meta_lr


class DirectionSoak(DirectionMachine, Counting):
    """All agreements and ways to take Hessian-vector products, more optimizers, and lists of two."""

    @initialize(
        method=st.sampled_from(["SmoothFish", "symmetric", "inner_product", "variance", "cosine"]),
        optimizer=st.sampled_from(["SGD", "Adam", "AdamW", "several"]),
        hvp=st.sampled_from(["reverse", "forward", "finite_difference"]),
        keep_graphs=st.booleans(),
        track=st.sampled_from([False, True, "pairs"]),
        gamma=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.01, 0.5)),
        seed=st.integers(0, 2**31),
    )
    def build(
        self,
        method: str,
        optimizer: str,
        hvp: str,
        keep_graphs: bool,
        track: Any,
        gamma: float,
        seed: int,
    ) -> None:
        differs = hvp == "finite_difference" and method not in ("SmoothFish", "symmetric")
        if differs and optimizer != "SGD":  # which divides by what is nearly zero
            optimizer = "SGD"
        self.hvp, self.keep_graphs = hvp, keep_graphs and hvp == "reverse"
        self.rtol = 1e-4 if differs else 1e-6
        DirectionMachine.build(self, method, optimizer, track, gamma, seed)

    def built(self, model: nn.Module) -> Any:
        parameters = list(model.parameters())
        if self.optimizer_name == "several":
            return [torch.optim.Adam(parameters[:3], lr=0.01), torch.optim.SGD(parameters[3:], lr=0.02, momentum=0.9)]
        options: dict[str, Any] = {
            "SGD": {"lr": 0.02, "momentum": 0.9},
            "Adam": {"lr": 0.01},
            "AdamW": {"lr": 0.01, "weight_decay": 0.1},
        }[self.optimizer_name]
        return getattr(torch.optim, self.optimizer_name)(parameters, **options)

    def optimizer_for(self, model: nn.Module) -> Any:
        built = self.built(model)
        return Several(built) if isinstance(built, list) else built

    def wrap(self, model: nn.Module) -> GradMatch[Any]:
        if self.name in ("SmoothFish", "symmetric"):
            symmetric = self.name == "symmetric"
            smooth_fish = SmoothFish(self.gamma, 0.05, model, track_alignment=self.track, symmetric=symmetric)
            return GradMatch(self.built(model), smooth_fish)
        settings: dict[str, Any] = {"track_alignment": self.track, "keep_graphs": self.keep_graphs, "hvp": self.hvp}
        return GradMatch(self.built(model), IDGM(model, self.gamma, self.name, **settings))

    @rule(count=st.integers(2, 4), scaled=st.booleans())
    def meta_step(self, count: int, scaled: bool) -> None:
        batches = make_batches(self.generator, count)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
        try:
            report = self.optimizer.meta_step(lambda b: loss_of(self.model, b), batches, scaler)
        except RuntimeError as error:
            # With gamma too large for the inner product, which is unbounded; nothing has changed then.
            if self.name != "inner_product" or "diverges" not in str(error):
                raise
            return
        assert (report.cosine is not None) is (bool(self.track) or self.name == "cosine")
        assert (report.cosines is not None) is (self.track == "pairs")
        self.plain_step(self.direction(batches))

    @rule(gamma=st.floats(0.0, 0.5), track=st.sampled_from([False, True, "pairs"]))
    def change_settings(self, gamma: float, track: Any) -> None:
        DirectionMachine.change_settings(self, gamma, track)

    @invariant()
    def agrees(self) -> None:
        assert_same_model(self.model, self.oracle, rtol=self.rtol)
        state = self.optimizer.optimizer.state_dict()["state"]
        assert_same_state(state, self.plain.state_dict()["state"], rtol=self.rtol)


MACHINES: dict[str, type[RuleBasedStateMachine]] = {"fish": FishSoak, "direction": DirectionSoak}


def cases(share: float) -> list[str]:
    """A hundred steps each, of the two machines in turn; fewer if there are not as many."""
    steps = min(IN_A_CASE, max(LENGTH, round(STEPS * share / 2)))
    number = max(2, round(STEPS * share / steps))
    return [f"{list(MACHINES)[i % 2]}/{i // 2}/{steps}" for i in range(number)]


def run(
    case: str, seed_of_all: int, folder: Path, machines: dict[str, type[RuleBasedStateMachine]] = MACHINES
) -> dict[str, Any]:
    """Carry out sequences until there are enough steps; hypothesis prints one that fails."""
    name, _, steps = case.split("/")
    draw = random.Random(f"stateful {case} {seed_of_all}")
    counts = {"rules": 0, "sequences": 0}

    def teardown(_machine: Any) -> None:
        counts["sequences"] += 1

    carried_out = 0
    while carried_out < int(steps):
        drawn: Any = type(machines[name].__name__, (machines[name],), {"counts": counts, "teardown": teardown})
        wanted = -(-(int(steps) - carried_out) // (LENGTH - 1))
        run_state_machine_as_test(
            seed(draw.randrange(2**32))(drawn),
            settings=settings(
                max_examples=wanted,
                stateful_step_count=LENGTH,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
        carried_out = counts["rules"] - counts["sequences"]
    return {"steps": carried_out, "sequences": counts["sequences"]}


def figures(lines: list[dict[str, Any]]) -> list[str]:
    steps, sequences = (sum(line[key] for line in lines) for key in ("steps", "sequences"))
    fish = sum(line["steps"] for line in lines if line["case"].startswith("fish"))
    told = (
        f"{steps:,} steps in {sequences:,} random sequences agree with the oracles: {fish:,} of Fish, "
        f"{steps - fish:,} of SmoothFish and IDGM"
    )
    return [told]
