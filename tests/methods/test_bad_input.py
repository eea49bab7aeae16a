"""What people hand in by mistake: an error in words that names it, and everything is as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import _networks as networks
import pytest
import torch
from _feature_training import batches, feature_net, snapshot
from _models import assert_identical, loss_of
from _networks import make
from _second_order import DIRECTIONS, EVERY, METHODS, nothing_changes
from torch import Tensor, nn
from torch.optim import SGD

from torch_gradmatch import Fish, GradMatch

# Those that evaluate a loss again.
TWICE = ["IDGM", "IDGM-forward", "IDGM-finite_difference", "SmoothFish", "SmoothFish-symmetric"]
every_method = pytest.mark.parametrize("method", METHODS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()


def inputs(size: int = 4) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


def wrap(method: str, model: nn.Module) -> GradMatch[Any]:
    return GradMatch(SGD(model.parameters(), lr=0.1), EVERY[method](model))


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


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


@every_method
def test_a_batch_that_is_consumed_serves_where_it_is_evaluated_once_and_else_is_told(method: str):
    model = network()
    optimizer = wrap(method, model)

    def meta_step() -> None:
        optimizer.meta_step(
            lambda b: model(b.pop("x")).square().mean(), {d: {"x": inputs()} for d in ("north", "south")}
        )

    if method not in TWICE:
        meta_step()
        return
    with nothing_changes(model, optimizer), pytest.raises(KeyError, match="x") as caught:
        meta_step()
    (told,) = [note for note in notes(caught.value) if "for the second time: does it change its batch (pop" in note]
    assert "(domain '" in told
    assert told.endswith(
        "Fish, SmoothFish at gamma 1 and IDGM(hvp='reverse', keep_graphs=True) call it once for each batch"
    )


WRONG_LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "vector": (lambda value: value.expand(3), ValueError, r"batch 2{} it has shape \(3,\)"),
    "float": (lambda value: float(value.detach()), TypeError, r"batch 2{} it returned float"),
    "none": (lambda _: None, TypeError, r"batch 2{} it returned NoneType"),
    "nan": (lambda value: value * float("nan"), ValueError, r"the loss of batch 2{} is nan: nothing was changed"),
    "infinite": (lambda value: value / 0.0, ValueError, r"batch 2{} is inf"),
    "detached": (lambda value: value.detach(), ValueError, r"batch 2{} does not depend"),
}


@pytest.mark.parametrize("wrong", WRONG_LOSSES)
@pytest.mark.parametrize("method", ["IDGM", "SmoothFish", "Fish", "VREx", "Fishr"])
def test_a_wrong_loss_is_named_and_nothing_changes(method: str, wrong: str):
    spoil, error, message = WRONG_LOSSES[wrong]
    case = make(networks.batch_norm_1d)
    optimizer = wrap(method, case.model)

    def loss(batch: Any) -> Any:
        value = case.loss(case.model, batch)
        return spoil(value) if batch is case.batches[2] else value

    named = dict(zip(("north", "south", 7), case.batches, strict=True))
    for given, name in ((case.batches, ""), (named, r" \(domain 7\)")):
        with nothing_changes(case.model, optimizer), pytest.raises(error, match=message.format(name)):
            optimizer.meta_step(loss, given)


def with_other_parameters(model: nn.Module) -> list[nn.Module]:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    return [model, model]


NOT_REACHED: dict[str, tuple[Callable[[nn.Module], list[nn.Module]], str]] = {
    "a copy is called": (lambda m: [copy.deepcopy(m)] * 2, r"batch 0 \(domain 'north'\) depends on none"),
    "a copy in one domain": (lambda m: [m, copy.deepcopy(m)], r"batch 1 \(domain 'south'\) depends on none"),
    "the model got others": (with_other_parameters, r"depends on none of the parameters|is not in the model"),
}


@pytest.mark.parametrize("case", NOT_REACHED)
@pytest.mark.parametrize("method", ["IDGM", "SmoothFish", "Fish"])
def test_a_loss_that_reaches_no_parameter_of_the_optimizer_is_told(method: str, case: str):
    model = network()
    optimizer, parameters = wrap(method, model), list(model.parameters())
    called = dict(zip((4, 5), NOT_REACHED[case][0](model), strict=True))
    before = copy.deepcopy((parameters, snapshot(model, optimizer)))
    with pytest.raises(ValueError, match=NOT_REACHED[case][1]):
        optimizer.meta_step(lambda x: called[len(x)](x).square().mean(), {"north": inputs(), "south": inputs(5)})
    assert_identical((parameters, snapshot(model, optimizer)), before)
    assert all(p.grad is None for p in parameters)


@every_method
def test_rows_that_a_forward_pass_has_shortened_are_as_before_after_an_error(method: str):
    """As ``max_norm`` writes them; the loss of one domain is not finite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3, max_norm=0.5), nn.Linear(3, 1)).double()
    optimizer = wrap(method, model)
    words = torch.arange(6).reshape(3, 2)
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match="batch 2 is nan"):
        optimizer.meta_step(lambda i: model(words[i]).square().mean() * (float("nan") if i == 2 else 1.0), range(3))


@every_method
def test_a_loss_fn_that_calls_backward_is_refused(method: str):
    model = feature_net()
    optimizer = wrap(method, model)

    def training_step(batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        loss.backward(retain_graph=batch[2] == 1)
        return loss

    with nothing_changes(model, optimizer), pytest.raises(RuntimeError, match=r"loss_fn called backward\(\)"):
        optimizer.meta_step(training_step, batches(2))
    optimizer.meta_step(partial(loss_of, model), batches(2))


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [([1.0, 2.0], "list, the batches.*swapped"), (torch.ones(()), "Tensor")],
    ids=["swapped", "loss"],
)
def test_what_is_no_function_is_refused(loss_fn: Any, got: str):
    with pytest.raises(TypeError, match=rf"loss_fn should be a function .*\(got {got}\)"):
        wrap("Fish", network()).meta_step(loss_fn, loss_of if isinstance(loss_fn, list) else [1.0, 2.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", DIRECTIONS)
def test_maximize_is_refused_where_matching_would_turn_round(method: str):
    model = network()
    message = r"maximize=True with (IDGM|SmoothFish), which minimizes: .* let loss_fn return the negative"
    with pytest.raises(ValueError, match=message):
        GradMatch(SGD(model.parameters(), lr=0.1, maximize=True), METHODS[method](model))
    optimizer = wrap(method, model)
    optimizer.param_groups[0]["maximize"] = True
    with nothing_changes(model, optimizer), pytest.raises(ValueError, match=message):
        optimizer.meta_step(lambda x: model(x).square().mean(), [inputs(), inputs(5)])


def test_fish_maximizes_as_it_minimizes_the_negative():
    models = [network(), network()]
    for model, maximize in zip(models, (True, False), strict=True):
        optimizer = GradMatch(SGD(model.parameters(), lr=0.1, maximize=maximize), Fish(0.5, model=model))
        sign = 1 if maximize else -1
        optimizer.meta_step(lambda x, m=model, s=sign: s * m(x).sigmoid().mean(), [inputs(), inputs(5)])
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict())
