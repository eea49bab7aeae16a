"""Checkpoints by ``torch.distributed.checkpoint`` resume bit for bit, also in the middle of an inner loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _layout import numbers_of
from _models import assert_identical
from _ranks import on_ranks
from _spread import full, sharded
from _wrapped import ITERATES
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is .* assuming the intent:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
Batch = tuple[Tensor, Tensor]
DOMAINS = 4


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Frozen weights, buffers, complex numbers' neighbours: matrices and vectors."""
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    model[2].requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def make_batches(count: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 3, generator=generator).to(dtype), torch.randn(6, 2, generator=generator).to(dtype))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def fish(model: nn.Module, **settings: Any) -> Fish:
    return Fish(0.25, inner_steps=DOMAINS, model=model, **settings)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd_and_adamw(model: nn.Module) -> list[Optimizer]:
    p = list(model.parameters())
    return [SGD(p[:3], lr=0.1, momentum=0.9), AdamW([{"params": p[3:5]}, {"params": p[5:], "lr": 0.02}], lr=0.05)]


Build = Callable[[nn.Module], GradMatch[Any]]
CASES: dict[str, Build] = {
    "carry": lambda m: GradMatch(Adam(m.parameters(), lr=0.05), fish(m)),
    "reset": lambda m: GradMatch(Adam(m.parameters(), lr=0.05, amsgrad=True), fish(m, inner_state="reset")),
    "tracked": lambda m: GradMatch(AdamW(m.parameters(), lr=0.05), fish(m, track_alignment=True)),
    "pairs": lambda m: GradMatch(AdamW(m.parameters(), lr=0.05), fish(m, track_alignment="pairs")),
    "bf16": lambda m: GradMatch(SGD(m.parameters(), lr=0.05, momentum=0.9), fish(m, meta_dtype=torch.float32)),
    "no-model": lambda m: GradMatch(Adam(m.parameters(), lr=0.05), Fish(0.25, inner_steps=DOMAINS)),
    "SGD": lambda m: GradMatch(SGD(m.parameters(), lr=0.1), fish(m)),
    "SGD-reset-tracked": lambda m: GradMatch(
        SGD(m.named_parameters(), lr=0.1), fish(m, inner_state="reset", track_alignment=True)
    ),
    "named": lambda m: GradMatch(AdamW(m.named_parameters(), lr=0.05), fish(m)),
    "schedule-free": lambda m: GradMatch(ITERATES["ScheduleFreeAdamW"][0](list(m.parameters())), fish(m)),
    "schedule-free-reset": lambda m: GradMatch(
        ITERATES["ScheduleFreeSGD"][0](list(m.parameters())), fish(m, inner_state="reset")
    ),
    "Adagrad": lambda m: GradMatch(torch.optim.Adagrad(trained(m), lr=0.1), fish(m)),
    "several": lambda m: GradMatch(sgd_and_adamw(m), fish(m)),
    "several-reset-tracked": lambda m: GradMatch(sgd_and_adamw(m), fish(m, inner_state="reset", track_alignment=True)),
    "SmoothFish": lambda m: GradMatch(Adam(m.parameters(), lr=0.05), SmoothFish(1.0, 0.1, m)),
    "SmoothFish-SGD": lambda m: GradMatch(SGD(m.parameters(), lr=0.05), SmoothFish(1.0, 0.1, m)),
    "IDGM": lambda m: GradMatch(Adam(m.parameters(), lr=0.05), IDGM(m, 0.1)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "nested": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full-offloaded": {"full_state_dict": True, "cpu_offload": True},
    "flat-offloaded": {"flatten_optimizer_state_dict": True, "cpu_offload": True},
}


def model_of(case: str) -> nn.Sequential:
    return network(torch.bfloat16 if case == "bf16" else torch.float64)


def train(case: str, model: nn.Module, optimizer: GradMatch[Any], batches: Sequence[Batch]) -> None:
    if case == "bf16":
        batches = [(x.bfloat16(), y.bfloat16()) for x, y in batches]
    if not isinstance(optimizer.method, Fish):
        for begin in range(0, len(batches) - 1, 2):
            optimizer.meta_step(lambda batch: loss_of(model, batch), batches[begin : begin + 2])
        return
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def everything(model: nn.Module, optimizer: GradMatch[Any]) -> Any:
    return copy.deepcopy((dict(model.state_dict()), optimizer.state_dict(), optimizer.inner_step))


def save(model: nn.Module, optimizer: GradMatch[Any], options: StateDictOptions, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: GradMatch[Any], options: StateDictOptions, folder: Path) -> None:
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def check_round_trip(case: str, options: dict[str, Any], steps: int, folder: Path) -> None:
    batches = make_batches(steps + DOMAINS + 2)
    model, resumed_model = model_of(case), model_of(case)
    optimizer, resumed = CASES[case](model), CASES[case](resumed_model)
    train(case, model, optimizer, batches[:steps])
    before = everything(model, optimizer)
    save(model, optimizer, StateDictOptions(**options), folder)
    assert_identical(everything(model, optimizer), before)  # saving changes nothing
    load(resumed_model, resumed, StateDictOptions(**options), folder)
    assert_identical(everything(resumed_model, resumed), before)
    train(case, model, optimizer, batches[steps:])
    train(case, resumed_model, resumed, batches[steps:])
    assert_identical(everything(resumed_model, resumed), everything(model, optimizer))
    assert (resumed.last_meta_step is None) == (optimizer.last_meta_step is None)
    if optimizer.last_meta_step is not None:
        assert_identical(vars(resumed.last_meta_step), vars(optimizer.last_meta_step))


@pytest.mark.parametrize("steps", [DOMAINS, DOMAINS + 2])
@pytest.mark.parametrize("options", ["nested", "flat"])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_resumes_bit_for_bit(case: str, options: str, steps: int, tmp_path: Path):
    check_round_trip(case, OPTIONS[options], steps, tmp_path)


@pytest.mark.parametrize("options", ["full", "full-offloaded", "flat-offloaded"])
@pytest.mark.parametrize("case", ["tracked", "SGD", "several", "schedule-free"])
def test_whatever_the_options(case: str, options: str, tmp_path: Path):
    check_round_trip(case, OPTIONS[options], DOMAINS + 3, tmp_path)


# ----------------------------------------------------------------------------------------------- on several processes


def ddp(case: str) -> tuple[nn.Module, GradMatch[Any]]:
    model = model_of(case)
    optimizer = CASES[case](model)
    return DistributedDataParallel(model), optimizer


def train_and_save(case: str, options: dict[str, Any], steps: int, folder: Path) -> Any:
    model, optimizer = ddp(case)
    train(case, model, optimizer, make_batches(steps))
    save(model, optimizer, StateDictOptions(**options), folder)
    return everything(model, optimizer)


def load_and_train(case: str, options: dict[str, Any], steps: int, more: int, folder: Path) -> Any:
    model, optimizer = ddp(case)
    load(model, optimizer, StateDictOptions(**options), folder)
    loaded = everything(model, optimizer)
    train(case, model, optimizer, make_batches(steps + more)[steps:])
    return loaded, everything(model, optimizer)


@pytest.mark.parametrize(
    ("case", "options"),
    [pytest.param("tracked", "nested", marks=pytest.mark.large), ("SGD", "flat"), ("several", "flat")],
)
def test_it_loads_on_another_number_of_ranks(case: str, options: str, tmp_path: Path):
    """Saved by 2 ranks in the middle of an inner loop; all ranks see the same batches, so they train as one does."""
    steps, more = DOMAINS + 2, DOMAINS
    saved = on_ranks(2, train_and_save, case, OPTIONS[options], steps, tmp_path)[0]
    model, optimizer = ddp_alone(case)
    train(case, model, optimizer, make_batches(steps + more))
    expected = everything(model, optimizer)
    for ranks in (1, 4):
        for loaded, trained in on_ranks(ranks, load_and_train, case, OPTIONS[options], steps, more, tmp_path):
            assert_identical(loaded, saved)
            assert_identical(trained[1:], expected[1:])
    for loaded, _ in on_ranks(3, load_and_train, case, OPTIONS[options], steps, 0, tmp_path):
        assert_identical(loaded, saved)


def ddp_alone(case: str) -> tuple[nn.Module, GradMatch[Any]]:
    model = model_of(case)
    return model, CASES[case](model)


def broadcast_from_rank_0(case: str, steps: int) -> tuple[Any, Any]:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model, optimizer = ddp(case)
    train(case, model, optimizer, make_batches(steps))
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    other, resumed = ddp(case)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, state if dist.get_rank() == 0 else {}, options=options)
    return everything(model, optimizer)[1:], everything(other, resumed)[1:]


@pytest.mark.parametrize("case", ["tracked", "SGD", "several"])
def test_rank_0_may_tell_the_others(case: str):
    for expected, found in on_ranks(2, broadcast_from_rank_0, case, DOMAINS + 3):
        assert_identical(found, expected)


def of_shards(case: str) -> tuple[nn.Module, GradMatch[Any]]:
    model = sharded(model_of(case))
    return model, CASES[case](model)


def whole(model: nn.Module, optimizer: GradMatch[Any]) -> Any:
    """The same on any number of ranks."""
    state = optimizer.state_dict()
    entries = {i: {k: full(v) for k, v in entry.items()} for i, entry in state["state"].items()}
    return {k: full(v) for k, v in model.state_dict().items()}, entries, state["param_groups"], optimizer.inner_step


def shard_and_save(case: str, options: dict[str, Any], steps: int, folder: Path) -> Any:
    model, optimizer = of_shards(case)
    train(case, model, optimizer, make_batches(steps))
    save(model, optimizer, StateDictOptions(**options), folder)
    return whole(model, optimizer)


def load_shards_and_train(case: str, options: dict[str, Any], steps: int, more: int, folder: Path) -> Any:
    model, optimizer = of_shards(case)
    load(model, optimizer, StateDictOptions(**options), folder)
    loaded = whole(model, optimizer)
    train(case, model, optimizer, make_batches(steps + more)[steps:])
    return loaded, whole(model, optimizer)


@pytest.mark.parametrize(
    ("case", "options"),
    [("tracked", "nested"), ("tracked", "full"), ("pairs", "flat"), ("bf16", "nested"), ("several", "flat")],
)
def test_shards_load_on_another_number_of_ranks(case: str, options: str, tmp_path: Path):
    """``fully_shard``: what is saved by 2 ranks goes to 4, to 1, and to a model that is not sharded."""
    steps, more = DOMAINS + 2, 3
    saved = on_ranks(2, shard_and_save, case, OPTIONS[options], steps, tmp_path)[0]
    expected = on_ranks(2, load_shards_and_train, case, OPTIONS[options], steps, more, tmp_path)[0][1]
    for ranks in (1, 4):
        for loaded, trained in on_ranks(ranks, load_shards_and_train, case, OPTIONS[options], steps, more, tmp_path):
            assert_identical(loaded, saved)
            if case == "several":  # bf16 is rounded by the number of ranks, and so are inner products
                assert_identical(trained, expected)
    model, optimizer = ddp_alone(case)
    load(model, optimizer, StateDictOptions(**OPTIONS[options]), tmp_path)
    assert_identical(whole(model, optimizer), saved)


# ------------------------------------------------------------------------------------------------ the step that is none


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("SmoothFish", "SmoothFish-SGD", "IDGM")])
def test_asking_a_new_optimizer_takes_no_inner_step(case: str):
    model, fresh_model = model_of(case), model_of(case)
    optimizer, fresh = CASES[case](model), CASES[case](fresh_model)
    batches = make_batches(2 * DOMAINS + 1)
    before = copy.deepcopy(dict(model.state_dict()))
    for _ in range(3):
        get_optimizer_state_dict(model, optimizer)
    assert optimizer.inner_step == 0
    assert optimizer.last_meta_step is None
    assert_identical(dict(model.state_dict()), before)
    with pytest.raises(RuntimeError, match=r"interpolate\(\) needs at least one inner step"):
        optimizer.interpolate()
    if "reset" in case or case == "SGD":  # the others keep the step count that this leaves in a plain one, too
        train(case, model, optimizer, batches)
        train(case, fresh_model, fresh, batches)
        assert_identical(everything(model, optimizer)[::2], everything(fresh_model, fresh)[::2])


def test_asking_in_the_middle_of_an_inner_loop_takes_no_step_either():
    """Plain SGD keeps nothing, so it looks new to torch each time."""
    model = network()
    optimizer = CASES["SGD"](model)
    train("SGD", model, optimizer, make_batches(2))
    optimizer.zero_grad()
    before = everything(model, optimizer)
    for _ in range(2):
        get_optimizer_state_dict(model, optimizer)
    resumed_model = network()
    resumed = CASES["SGD"](resumed_model)
    resumed_model.load_state_dict(before[0])
    resumed.load_state_dict(before[1])
    for _ in range(2):
        get_optimizer_state_dict(resumed_model, resumed)
    assert_identical(everything(model, optimizer), before)
    assert_identical(everything(resumed_model, resumed), before)


def test_a_warm_up_from_zero_counts():
    model = network()
    optimizer = GradMatch(Adam(model.parameters(), lr=0.0), fish(model))
    train("carry", model, optimizer, make_batches(1))
    assert optimizer.inner_step == 1


def test_an_optimizer_that_needs_a_closure_says_so():
    model = network()
    optimizer = GradMatch(torch.optim.LBFGS(model.parameters()), fish(model))
    with pytest.raises(RuntimeError, match="LBFGS needs a closure, so torch"):
        get_optimizer_state_dict(model, optimizer)
    assert optimizer.inner_step == 0


def test_a_meta_iteration_that_failed_first_does_not_hide_that_there_is_no_state(tmp_path: Path):
    """Else what Adam keeps would be lost in silence: torch restores only what is there already."""
    model, resumed_model = network(), network()
    optimizer, resumed = CASES["carry"](model), CASES["carry"](resumed_model)
    train("carry", model, optimizer, make_batches(DOMAINS + 1))
    save(model, optimizer, StateDictOptions(), tmp_path)
    bad = [*make_batches(DOMAINS - 1), (torch.full((6, 3), torch.nan).double(), torch.zeros(6, 2).double())]
    with pytest.raises(ValueError, match="loss of batch 3 is nan"):
        resumed.meta_step(lambda batch: loss_of(resumed_model, batch), bad)
    resumed.zero_grad()
    load(resumed_model, resumed, StateDictOptions(), tmp_path)
    assert_identical(everything(resumed_model, resumed), everything(model, optimizer))


# ------------------------------------------------------------------------------------------------------- other ways in


class AppState(Stateful):
    """As in PyTorch's recipe for distributed checkpoints."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        of_model, of_optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": of_model, "optim": of_optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


@pytest.mark.parametrize("case", ["tracked", "several"])
def test_the_recipe_with_a_stateful_object(case: str, tmp_path: Path):
    model, resumed_model = network(), network()
    optimizer, resumed = CASES[case](model), CASES[case](resumed_model)
    train(case, model, optimizer, make_batches(DOMAINS + 1))
    dcp.save({"app": AppState(model, optimizer)}, checkpoint_id=tmp_path)
    dcp.load({"app": AppState(resumed_model, resumed)}, checkpoint_id=tmp_path)
    assert_identical(everything(resumed_model, resumed), everything(model, optimizer))


def test_a_file_of_a_whole_state_dict_loads_by_names():
    model, resumed_model = network(), network()
    optimizer, resumed = CASES["tracked"](model), CASES["tracked"](resumed_model)
    train("tracked", model, optimizer, make_batches(DOMAINS + 3))
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    assert set(state["state"]["0.weight"]) >= {"exp_avg", "slow", "alignment_sums", "slow_buffer:1.running_mean"}
    resumed_model.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert_identical(everything(resumed_model, resumed), everything(model, optimizer))


def test_what_was_lost_on_the_way_is_noticed():
    model = network()
    optimizer = CASES["tracked"](model)
    train("tracked", model, optimizer, make_batches(DOMAINS))
    for key in ("slow", "alignment_units"):
        state = copy.deepcopy(optimizer.state_dict())
        del state["state"][1][key]
        before = everything(model, optimizer)
        with pytest.raises(ValueError, match=rf"lacks .*{'slow weights' if key == 'slow' else key}.* of parameter 1"):
            optimizer.load_state_dict(state)
        assert_identical(everything(model, optimizer), before)


def test_the_entries_are_always_the_same_ones():
    for case in ("pairs", "schedule-free", "several-reset-tracked"):
        model = network()
        optimizer = CASES[case](model)
        get_optimizer_state_dict(model, optimizer)
        seen = []
        for batch in make_batches(DOMAINS + 1):
            seen.append({i: set(entry) for i, entry in optimizer.state_dict()["state"].items()})
            assert {i: set(optimizer.state[p]) for i, p in enumerate(model.parameters()) if p.requires_grad} == seen[-1]
            train(case, model, optimizer, [batch])
        assert all(entries == seen[0] for entries in seen), case
        assert numbers_of(optimizer.state_dict())["inner_step"] == 1
