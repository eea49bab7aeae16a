"""What people hand in by mistake: an error in words that names it, and everything is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _models import assert_identical
from _second_order import DIRECTIONS, METHODS, nothing_changes
from torch import Tensor, nn

from torch_gradmatch import Fish, GradMatch

# Those that evaluate a loss again.
TWICE = ["IDGM", "IDGM-forward", "IDGM-finite_difference", "SmoothFish", "SmoothFish-symmetric"]
every_method = pytest.mark.parametrize("method", METHODS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


def inputs(size: int = 4) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


def wrap(method: str, model: nn.Module) -> GradMatch:
    return GradMatch(torch.optim.SGD(model.parameters(), lr=0.1), METHODS[method](model))


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


# ------------------------------------------------------------------------------------------------------------- batches


@every_method
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence:UserWarning")
def test_one_batch_that_is_a_dictionary_is_said_to_have_been_taken_for_a_mapping_of_domains(method: str):
    model = network()
    optimizer = wrap(method, model)
    batch = {"image": inputs(), "label": torch.zeros(4, 1, dtype=torch.float64)}
    with nothing_changes(model, optimizer), pytest.raises((IndexError, TypeError)) as caught:
        optimizer.meta_step(lambda b: (model(b["image"]) - b["label"]).square().mean(), batch)
    said = "batches was a mapping, whose keys ['image', 'label'] were taken for the domains"
    assert said in notes(caught.value)


@every_method
def test_the_domain_whose_last_batch_is_one_sample_is_named_and_said_once(method: str):
    """BatchNorm cannot normalize it."""
    model = network()
    optimizer = wrap(method, model)
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match="Expected more than 1 value") as caught:
        optimizer.meta_step(lambda x: model(x).square().mean(), {"north": inputs(), "south": inputs(1)})
    said = [note for note in notes(caught.value) if note.startswith("raised when loss_fn")]
    assert said == ["raised when loss_fn was called with batch 1 (domain 'south')"]


CONSUMED: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor], str]] = {
    "pop": (lambda: {"x": inputs()}, lambda b: b.pop("x"), "x"),
    "iterator": (lambda: iter(inputs()), lambda b: torch.stack(list(b)), "non-empty TensorList"),
}


@pytest.mark.parametrize("kind", CONSUMED)
@every_method
def test_a_batch_that_is_consumed_serves_where_it_is_evaluated_once_and_else_is_told(method: str, kind: str):
    model = network()
    optimizer = wrap(method, model)
    make, read, message = CONSUMED[kind]

    def train() -> None:
        optimizer.meta_step(lambda b: model(read(b)).square().mean(), {"north": make(), "south": make()})

    if method not in TWICE:
        train()
        return
    with nothing_changes(model, optimizer), pytest.raises((KeyError, RuntimeError), match=message) as caught:
        train()
    told = [note for note in notes(caught.value) if "for the second time: does it change its batch (pop" in note]
    assert len(told) == 1
    assert "(domain '" in told[0]
    assert told[0].endswith(
        "Fish, SmoothFish at gamma 1 and IDGM(hvp='reverse', keep_graphs=True) call it once for each batch"
    )


@pytest.mark.parametrize("method", TWICE)
def test_a_batch_that_is_changed_in_place_is_named_and_the_change_among_the_causes(method: str):
    model = network().eval()  # else BatchNorm takes the change away again
    optimizer = wrap(method, model)
    message = r"batch \d \(domain '\w+'\).* a batch that loss_fn changes in place"
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.meta_step(lambda x: model(x.mul_(0.8)).square().mean(), {"north": inputs(), "south": inputs(5)})


# -------------------------------------------------------------------------------------------------------------- models


def another(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def with_other_parameters(model: nn.Module) -> nn.Module:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return model


@pytest.mark.parametrize("replace", [another, with_other_parameters])
@pytest.mark.parametrize("method", ["IDGM", "SmoothFish", "Fish"])
def test_a_loss_that_reaches_no_parameter_of_the_optimizer_is_told(
    method: str, replace: Callable[[nn.Module], nn.Module]
):
    """It calls a copy, or a preparation has put other parameters into the model."""
    model = network()
    optimizer = wrap(method, model)
    parameters = list(model.parameters())
    called = replace(model)
    before = copy.deepcopy((parameters, model.state_dict(), optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"batch 0 depends on none of the parameters|is not in the model"):
        optimizer.meta_step(lambda x: called(x).square().mean(), [inputs(), inputs(5)])
    assert_identical(
        (parameters, dict(model.state_dict()), optimizer.state_dict()), (before[0], dict(before[1]), before[2])
    )


@pytest.mark.parametrize("method", ["IDGM", "SmoothFish", "Fish"])
def test_a_domain_that_reaches_none_is_named(method: str):
    model = network()
    optimizer, networks = wrap(method, model), {4: model, 5: copy.deepcopy(model)}
    message = r"the loss of batch 1 \(domain 'south'\) depends on none of the parameters"
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.meta_step(lambda x: networks[len(x)](x).square().mean(), {"north": inputs(), "south": inputs(5)})


@every_method
def test_rows_that_a_forward_pass_has_shortened_are_as_before_after_an_error(method: str):
    """As ``max_norm`` writes them; the loss of one domain is not finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, max_norm=0.5), nn.Linear(3, 1)).double()
    optimizer = wrap(method, model)
    words = torch.arange(6).reshape(3, 2)
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match="batch 2 is nan"):
        optimizer.meta_step(lambda i: model(words[i]).square().mean() * (float("nan") if i == 2 else 1.0), range(3))


# ---------------------------------------------------------------------------------------------------------- optimizers


def maximizing(model: nn.Module, *, maximize: bool = True) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, maximize=maximize)


@pytest.mark.parametrize("method", DIRECTIONS)
def test_maximize_is_refused_where_matching_would_turn_round(method: str):
    model = network()
    message = r"maximize=True with (IDGM|SmoothFish), which minimizes: .* let loss_fn return the negative"
    with pytest.raises(ValueError, match=message):
        GradMatch(maximizing(model), METHODS[method](model))
    optimizer = wrap(method, model)
    optimizer.param_groups[0]["maximize"] = True
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.meta_step(lambda x: model(x).square().mean(), [inputs(), inputs(5)])
    assert_identical(dict(model.state_dict()), dict(before))


def test_fish_maximizes_as_it_minimizes_the_negative():
    models = [network(), network()]
    for model, maximize in zip(models, (True, False), strict=True):
        optimizer = GradMatch(maximizing(model, maximize=maximize), Fish(0.5, model=model))
        sign = 1 if maximize else -1
        optimizer.meta_step(lambda x, m=model, s=sign: s * m(x).sigmoid().mean(), [inputs(), inputs(5)])
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
