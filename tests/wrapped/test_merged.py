"""``GradMatch.state``: the wrapped optimizer's entries and ours as one mapping."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from torch_gradmatch import Fish, GradMatch


def trained(*, several: bool = False) -> tuple[list[nn.Parameter], GradMatch[Fish]]:
    """Two parameters after one of two inner steps."""
    w, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    wrapped: Any = [SGD([w], lr=0.1, momentum=0.9), Adam([b])] if several else Adam([w, b])
    optimizer = GradMatch(wrapped, Fish(0.5, inner_steps=2))
    (w.sum() + b.sum()).backward()
    optimizer.step()
    return [w, b], optimizer


@pytest.mark.parametrize("several", [False, True])
def test_it_shows_both_and_the_wrapped_optimizer_never_sees_ours(several: bool):
    (w, b), optimizer = trained(several=several)
    assert list(optimizer.state) == [w, b]
    assert len(optimizer.state) == 2
    assert list(optimizer.state[b]) == ["step", "exp_avg", "exp_avg_sq", "slow"]
    assert list(optimizer.state[w]) == (["momentum_buffer", "slow"] if several else list(optimizer.state[b]))
    owners = optimizer.optimizer.optimizers if several else [optimizer.optimizer]  # type: ignore[attr-defined]
    for owner in owners:
        assert all("slow" not in entry for entry in owner.state.values())
    assert torch.equal(optimizer.state[w]["slow"], torch.ones(2))


def test_any_other_parameter_has_an_empty_entry_as_in_a_plain_optimizer():
    (w, _), optimizer = trained()
    other = nn.Parameter(torch.ones(1))
    assert optimizer.state[other] == {}
    assert optimizer.state.get(other) is None
    assert other not in optimizer.state
    assert other not in optimizer.optimizer.state
    assert not GradMatch(Adam([w])).state


def moved(entry: Any) -> Any:
    """As Lightning rebuilds what it moves to a device: a mapping of the same class."""
    if isinstance(entry, Tensor):
        return entry.double()
    if isinstance(entry, Mapping):
        return type(entry)({key: moved(value) for key, value in entry.items()})  # type: ignore[call-arg]
    return entry


@pytest.mark.parametrize("several", [False, True])
def test_what_is_set_goes_to_where_it_belongs(several: bool):
    parameters, optimizer = trained(several=several)
    for p, entry in optimizer.state.items():
        optimizer.state[p] = moved(entry)
    owners = optimizer.optimizer.optimizers if several else [optimizer.optimizer]  # type: ignore[attr-defined]
    for p in parameters:
        assert optimizer.state[p]["slow"].dtype == torch.float64
        for owner in owners:
            assert all(value.dtype == torch.float64 for value in owner.state.get(p, {}).values())
            assert "slow" not in owner.state.get(p, {})


def test_an_entry_writes_through():
    (w, _), optimizer = trained()
    wrapped = optimizer.optimizer.state
    entry = optimizer.state[w]
    entry["exp_avg"] = torch.zeros(2)
    entry.update(slow=torch.full((2,), 7.0))
    assert wrapped[w]["exp_avg"].tolist() == [0.0, 0.0]
    assert optimizer.state[w]["slow"].tolist() == [7.0, 7.0]
    assert entry.setdefault("more", 1) == wrapped[w]["more"] == 1
    assert entry.pop("more") == 1
    assert entry.pop("more", None) is None
    assert "more" not in wrapped[w]
    optimizer.rollback()
    assert w.tolist() == [7.0, 7.0]
    entry.clear()
    assert optimizer.state[w] == {}
    assert wrapped[w] == {}


def test_entries_are_removed_on_both_sides():
    (w, b), optimizer = trained()
    del optimizer.state[w]
    assert w not in optimizer.optimizer.state
    assert list(optimizer.state) == [b]
    with pytest.raises(KeyError):
        del optimizer.state[w]
    optimizer.state.clear()
    assert not optimizer.state
    assert not optimizer.optimizer.state


def test_the_state_can_be_replaced():
    (w, b), optimizer = trained()
    optimizer.state = {p: {k: v + 1 for k, v in entry.items()} for p, entry in optimizer.state.items()}
    assert optimizer.state[w]["slow"].tolist() == [2.0, 2.0]
    assert optimizer.optimizer.state[b]["step"] == 2


@pytest.mark.parametrize("through", [copy.deepcopy, lambda entry: pickle.loads(pickle.dumps(entry))])
def test_a_copy_of_an_entry_is_a_plain_dictionary(through: Any):
    (w, _), optimizer = trained()
    entry = through(optimizer.state[w])
    assert type(entry) is dict
    assert set(entry) == set(optimizer.state[w])


def test_an_entry_of_the_wrapped_optimizer_of_our_name_is_left_alone():
    class Slow(SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                self.state[p]["slow"] = self.state[p].get("slow", 0) + p.grad
                p -= 0.1 * self.state[p]["slow"]

    def build() -> tuple[nn.Parameter, GradMatch[Fish]]:
        w = nn.Parameter(torch.ones(2))
        return w, GradMatch(Slow([w], lr=0.1), Fish(0.5, inner_steps=2))

    (w, optimizer), (w2, resumed) = build(), build()
    for step in range(5):
        if step == 3:
            state = copy.deepcopy(optimizer.state_dict())
            assert "gradmatch" in state  # for a parameter's entry has no room for ours
            w2.data.copy_(w.data)
            resumed.load_state_dict(state)
        for p, one in ((w, optimizer), *([(w2, resumed)] if step >= 3 else [])):
            one.zero_grad()
            p.square().sum().backward()
            one.step()
    assert torch.equal(w, w2)
    assert optimizer.state[w]["slow"] is optimizer.optimizer.state[w]["slow"]


def test_the_entry_for_checkpoints_is_in_every_group_and_not_shown():
    optimizer = GradMatch(Adam([nn.Parameter(torch.ones(1))]))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert all(group["gradmatch"] == "" for group in optimizer.param_groups)
    assert "gradmatch" not in repr(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(group["gradmatch"] == "" for group in optimizer.param_groups)
