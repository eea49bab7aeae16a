"""Several optimizers wrapped as one, beside the loop that steps each of them by hand; in float64, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import pytorch_optimizer
import torch
from _layout import in_format_3
from _models import assert_identical
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR

from torch_gradmatch import IDGM, Fish, GradMatch, SmoothFish, compare

META_LR = 0.25  # a power of two: then every way to interpolate rounds alike
DOMAINS = 3
Batch = tuple[Tensor, Tensor]
By = Callable[[Sequence[Optimizer]], object]  # what happens at the start of every inner loop


def make_model(seed: int = 0, *, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return model


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def rest(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() != 2]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    return [Muon(matrices(model), lr=0.05), AdamW(rest(model), lr=0.02)]


def make_batches(count: int, seed: int = 1) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((8, 4), (8, 2))
    return [tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes) for _ in range(count)]  # type: ignore[misc]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def train(
    optimizer: GradMatch[Any], model: nn.Module, batches: Sequence[Batch], after_step: Any = lambda: None
) -> None:
    """The plain loop of a user."""
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
        after_step()


class ByHand:
    """Algorithm 1 in a loop that knows each of the optimizers. ``begin`` is called before every inner loop."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], begin: By = lambda _: None) -> None:
        self.model, self.optimizers, self.begin = model, optimizers, begin
        self.slow: dict[Tensor, Tensor] = {}
        self.steps = 0

    def step(self, batch: Batch, *, skipped: bool = False) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        self.walk(skipped=skipped)

    def walk(self, *, skipped: bool = False) -> None:
        if self.steps == 0:
            self.begin(self.optimizers)
        for p in self.model.parameters():
            if p not in self.slow:
                self.slow[p] = p.detach().clone()
        for optimizer in self.optimizers if not skipped else ():
            optimizer.step()
        self.steps += 1
        if self.steps == DOMAINS:
            with torch.no_grad():
                for p, slow in self.slow.items():
                    p.copy_(slow + META_LR * (p - slow))
            self.slow, self.steps = {}, 0

    def train(self, batches: Sequence[Batch], after_step: Any = lambda: None) -> None:
        for batch in batches:
            self.step(batch)
            after_step()


def forget_all(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.state.clear()


def forget_first(optimizers: Sequence[Optimizer]) -> None:
    optimizers[0].state.clear()


def forget_first_of_wrapped(optimizer: Any) -> None:
    forget_first(optimizer.optimizers)


INNER_STATES: dict[str, tuple[Any, By]] = {
    "carry": ("carry", lambda _: None),
    "reset": ("reset", forget_all),
    "callable": (forget_first_of_wrapped, forget_first),
}
every_inner_state = pytest.mark.parametrize("inner_state", INNER_STATES)


def fish(inner_state: str = "carry", **others: Any) -> Fish:
    return Fish(META_LR, inner_steps=DOMAINS, inner_state=INNER_STATES[inner_state][0], **others)


def assert_same(model: nn.Module, optimizer: GradMatch[Any], reference: nn.Module, optimizers: Any) -> None:
    assert_identical(dict(model.named_parameters()), dict(reference.named_parameters()), "parameters")
    wrapped = optimizer.optimizer.optimizers  # type: ignore[attr-defined]
    found = [o.state_dict() for o in wrapped]
    for state in found:
        for group in state["param_groups"]:
            assert group.pop("gradmatch", "") == ""  # which is for torch.distributed.checkpoint
    assert_identical(found, [o.state_dict() for o in optimizers], "optimizers")


def everything(model: nn.Module, optimizer: GradMatch[Any]) -> Any:
    """Copies of all that may change."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.inner_step)), gradients


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------------------- steps


@every_inner_state
@pytest.mark.parametrize("by", ["step", "meta_step"])
def test_fish_is_the_loop_over_both_by_hand(inner_state: str, by: str):
    model, reference = make_model(), make_model()
    method = fish(inner_state, track_alignment=True)
    optimizer = GradMatch(muon_and_adamw(model), method)
    hand = ByHand(reference, muon_and_adamw(reference), INNER_STATES[inner_state][1])
    batches = make_batches(4 * DOMAINS)
    for begin in range(0, len(batches), DOMAINS):
        group = batches[begin : begin + DOMAINS]
        if by == "meta_step":
            optimizer.meta_step(lambda batch: loss_of(model, batch), group)
            hand.train(group)
            assert_same(model, optimizer, reference, hand.optimizers)
        else:
            for batch in group:
                train(optimizer, model, [batch])
                hand.step(batch)
                assert_same(model, optimizer, reference, hand.optimizers)
    assert optimizer.last_meta_step is not None
    assert optimizer.last_meta_step.cosine is not None


def mean_gradient_along_the_walk(model: nn.Module, batches: Sequence[Batch], inner_lr: float) -> list[Tensor]:
    walker = copy.deepcopy(model)
    total = [torch.zeros_like(p) for p in walker.parameters()]
    for batch in batches:
        gradients = torch.autograd.grad(loss_of(walker, batch), list(walker.parameters()))
        with torch.no_grad():
            for p, g, t in zip(walker.parameters(), gradients, total, strict=True):
                t += g
                p -= inner_lr * g
    return [t / len(batches) for t in total]


def direction_of_idgm(model: nn.Module, batches: Sequence[Batch], gamma: float) -> list[Tensor]:
    """The gradient of mean loss and gamma times the variance of the gradients, by differentiating it twice."""
    parameters = list(model.parameters())
    losses = [loss_of(model, batch) for batch in batches]
    gradients = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in losses]
    means = [torch.stack(ones).mean(0) for ones in zip(*gradients, strict=True)]
    spread = sum((g - m).square().sum() for ones in gradients for g, m in zip(ones, means, strict=True)) / len(batches)
    return list(torch.autograd.grad(sum(losses) / len(batches) + gamma * spread, parameters))


@pytest.mark.parametrize("kind", [SmoothFish, IDGM])
def test_the_other_methods_are_one_step_of_each_on_the_direction(kind: type[Any]):
    """Bit for bit beside the direction that a single optimizer is handed; that is the one by hand, to rounding."""
    model, reference = make_model(), make_model()
    methods = [SmoothFish(1.0, 0.1) if kind is SmoothFish else IDGM(m, 0.5, "variance") for m in (model, reference)]
    optimizer = GradMatch(muon_and_adamw(model), methods[0])
    optimizers = muon_and_adamw(reference)
    finder = GradMatch(SGD([*matrices(reference), *rest(reference)], lr=0.0), methods[1])
    batches = make_batches(4 * DOMAINS)
    for begin in range(0, len(batches), DOMAINS):
        group = batches[begin : begin + DOMAINS]
        optimizer.meta_step(lambda batch: loss_of(model, batch), group)
        by_hand = (
            mean_gradient_along_the_walk(reference, group, 0.1)
            if kind is SmoothFish
            else direction_of_idgm(reference, group, 0.5)
        )
        finder.meta_step(lambda batch: loss_of(reference, batch), group)
        for p, g in zip(reference.parameters(), by_hand, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
        for one in optimizers:
            one.step()
        assert_same(model, optimizer, reference, optimizers)


@pytest.mark.parametrize("method", [SmoothFish(1.0, 0.1), None], ids=["SmoothFish", "IDGM"])
def test_step_of_a_method_without_inner_loop_is_ordinary_training(method: Any):
    model, reference = make_model(), make_model()
    optimizer = GradMatch(muon_and_adamw(model), method or IDGM(model, gamma=0.5))
    optimizers = muon_and_adamw(reference)
    batches = make_batches(4)
    train(optimizer, model, batches)
    for batch in batches:
        for one in optimizers:
            one.zero_grad()
        loss_of(reference, batch).backward()
        for one in optimizers:
            one.step()
    assert_same(model, optimizer, reference, optimizers)


@settings(deadline=None, max_examples=25)
@given(
    owners=st.lists(st.integers(0, 2), min_size=6, max_size=6).filter(lambda owners: len(set(owners)) > 1),
    inner_state=st.sampled_from(["carry", "reset"]),
    build=st.sampled_from(
        [
            lambda p: Adam(p, lr=0.05),
            lambda p: SGD(p, lr=0.1, momentum=0.9),
            lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
            lambda p: torch.optim.NAdam(p, lr=0.05),
        ]
    ),
    steps=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_however_the_parameters_are_shared_out_it_is_one_optimizer(owners, inner_state, build, steps, seed):
    """What treats every element by itself does not know which optimizer holds it."""
    model, reference = make_model(seed), make_model(seed)
    shares = [[p for p, owner in zip(model.parameters(), owners, strict=True) if owner == i] for i in set(owners)]
    several = GradMatch([build(share) for share in shares], fish(inner_state))
    one = GradMatch(build(list(reference.parameters())), fish(inner_state))
    batches = make_batches(steps, seed)
    train(several, model, batches)
    train(one, reference, batches)
    assert_identical(dict(model.named_parameters()), dict(reference.named_parameters()))


def test_a_list_of_one_and_a_tuple_are_lists():
    model, reference = make_model(), make_model()
    batches = make_batches(2 * DOMAINS)
    optimizer = GradMatch([Adam(model.parameters(), lr=0.05)], fish("reset"))
    train(optimizer, model, batches)
    train(GradMatch(Adam(reference.parameters(), lr=0.05), fish("reset")), reference, batches)
    assert_identical(dict(model.named_parameters()), dict(reference.named_parameters()))
    members = muon_and_adamw(model)
    assert GradMatch(tuple(members)).optimizer.optimizers == members  # type: ignore[attr-defined]


def test_rollback_and_slow_weights_are_those_of_both():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    batches = make_batches(DOMAINS + 2)
    train(optimizer, model, batches[:DOMAINS])
    slow = copy.deepcopy(model.state_dict())
    train(optimizer, model, batches[DOMAINS:])
    fast = copy.deepcopy(model.state_dict())
    with optimizer.slow_weights():
        assert_identical(dict(model.state_dict()), dict(slow))
    assert_identical(dict(model.state_dict()), dict(fast))
    optimizer.rollback()
    assert_identical(dict(model.state_dict()), dict(slow))


@pytest.mark.parametrize("by", ["wrapper", "several", "members"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_reaches_all(set_to_none: bool, by: str):
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    loss_of(model, make_batches(1)[0]).backward()
    reset = {"wrapper": [optimizer], "several": [optimizer.optimizer], "members": optimizer.optimizer.optimizers}  # type: ignore[attr-defined]
    for one in reset[by]:
        one.zero_grad(set_to_none=set_to_none)
    gradients = [p.grad for p in model.parameters()]
    assert all(g is None if set_to_none else g is not None and not g.any() for g in gradients)


def test_a_closure_is_evaluated_once_before_all_steps():
    model, reference = make_model(), make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish(track_alignment=True))
    hand = ByHand(reference, muon_and_adamw(reference))
    calls = []
    for batch in make_batches(2 * DOMAINS):

        def closure(batch: Batch = batch) -> Tensor:
            assert torch.is_grad_enabled()
            calls.append(copy.deepcopy(model.state_dict()))
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        before = dict(copy.deepcopy(reference.state_dict()))
        with torch.no_grad():
            returned = optimizer.step(closure)
        assert torch.equal(returned.detach(), loss_of(reference, batch).detach())
        hand.step(batch)
        assert_identical(dict(calls[-1]), before)
        assert_same(model, optimizer, reference, hand.optimizers)
    assert len(calls) == 2 * DOMAINS
    assert optimizer.last_meta_step is not None
    assert optimizer.last_meta_step.cosine is not None


# ----------------------------------------------------------------------------------------------------------- refused


def sam(parameters: Any) -> Optimizer:
    return pytorch_optimizer.SAM(parameters, SGD, lr=0.1)


@pytest.mark.parametrize(
    ("listed", "error", "message"),
    [
        (lambda _: [], ValueError, "optimizer is an empty list: pass at least one"),
        (lambda m: [*muon_and_adamw(m), None], TypeError, r"optimizer\[2\] should be .*already built \(got NoneType\)"),
        (lambda m: [AdamW], TypeError, r"optimizer\[0\] should be .*already built \(got the class AdamW\)"),
        (lambda m: [matrices(m)], TypeError, r"optimizer\[0\] should be .*\(got list\)"),
        (lambda m: [muon_and_adamw(m)[0]] * 2, ValueError, r"optimizer\[1\] is in the list twice"),
        (lambda m: iter(muon_and_adamw(m)), TypeError, r"already built \(got list_iterator\)"),
        (lambda m: [GradMatch(AdamW(rest(m)))], TypeError, "optimizer holds a GradMatch.*wrap them once"),
        (
            lambda m: [Muon(matrices(m)), AdamW([*rest(m), matrices(m)[1]])],
            ValueError,
            r"optimizer\[0\] and optimizer\[1\] hold the same parameter, number 3 of .*of shape \(5, 6\)",
        ),
        (
            lambda m: [SGD(rest(m), lr=0.1), Muon(matrices(m)), Adam([rest(m)[0]])],
            ValueError,
            r"optimizer\[0\] and optimizer\[2\] hold the same parameter, number 0 of .*of shape \(6,\)",
        ),
        (lambda m: [Muon(matrices(m)), torch.optim.LBFGS(rest(m))], ValueError, r"\[1\], a LBFGS, needs a closure"),
        (lambda m: [sam(matrices(m)), AdamW(rest(m))], ValueError, r"\[0\], a SAM, needs a closure.*by itself"),
        (
            lambda m: [SGD(matrices(m), lr=0.1), pytorch_optimizer.AliG(rest(m))],
            ValueError,
            r"\[1\], a AliG, needs a closure",
        ),
        pytest.param(
            lambda m: [pytorch_optimizer.SafeFP16Optimizer(SGD(matrices(m), lr=0.1)), SGD(rest(m), lr=0.1)],
            TypeError,
            "param_groups: it is no whole optimizer",
        ),
    ],
    ids=[
        "nothing",
        "None",
        "class",
        "parameters",
        "twice",
        "iterator",
        "GradMatch",
        "shared-matrix",
        "shared-bias",
        "LBFGS",
        "SAM",
        "AliG",
        "no-groups",
    ],
)
def test_what_is_no_list_of_disjoint_optimizers_is_refused(listed: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        GradMatch(listed(make_model()))


def test_groups_are_added_to_one_of_them():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model))
    extra = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    for refused in (
        lambda: optimizer.add_param_group({"params": [extra]}),
        lambda: optimizer.optimizer.add_param_group({"params": [extra]}),
        lambda: setattr(optimizer, "param_groups", []),
    ):
        with pytest.raises(RuntimeError, match=r"2 optimizers are wrapped as one.*optimizers\[0\]\.add_param_group"):
            refused()
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize(
    "name",
    [
        "MADGRAD",
        "FTRL",
        "DAdaptAdaGrad",
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_one_that_works_the_parameters_out_of_its_state_is_warned_of(name: str, place: int):
    model = make_model()
    first, *others = model.parameters()
    members = [getattr(pytorch_optimizer, name)([first], lr=0.1), SGD(others, lr=0.1)]
    with pytest.warns(UserWarning, match='works the parameters out.*Fish\\(inner_state="reset"\\)'):
        GradMatch(members[::-1] if place else members, Fish(0.5))


# ------------------------------------------------------------------------------------------------------- checkpoints


@every_inner_state
def test_it_resumes_in_the_middle_of_an_inner_loop(inner_state: str):
    batches = make_batches(4 * DOMAINS)
    whole, whole_optimizer, whole_scheduler = trainer(inner_state)
    train(whole_optimizer, whole, batches, whole_scheduler.step)
    model, optimizer, scheduler = trainer(inner_state)
    train(optimizer, model, batches[:5], scheduler.step)
    assert optimizer.inner_step == 2
    saved = through_a_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    again, optimizer_again, scheduler_again = trainer(inner_state, seed=1)
    again.load_state_dict(saved[0])
    optimizer_again.load_state_dict(saved[1])
    scheduler_again.load_state_dict(saved[2])
    assert optimizer_again.inner_step == 2
    assert_identical(optimizer_again.state_dict(), optimizer.state_dict())
    train(optimizer_again, again, batches[5:], scheduler_again.step)
    assert_identical(dict(again.named_parameters()), dict(whole.named_parameters()))
    assert_identical(optimizer_again.state_dict(), whole_optimizer.state_dict())
    assert whole_optimizer.last_meta_step is not None
    assert optimizer_again.last_meta_step is not None
    assert torch.equal(optimizer_again.last_meta_step.cosine, whole_optimizer.last_meta_step.cosine)


def trainer(inner_state: str, seed: int = 0) -> tuple[nn.Module, GradMatch[Fish], OneCycleLR]:
    model = make_model(seed)
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state, track_alignment=True))
    return model, optimizer, OneCycleLR(optimizer, max_lr=[0.1, 0.05], total_steps=40, cycle_momentum=False)


@pytest.mark.parametrize("kind", [SmoothFish, IDGM])
def test_the_other_methods_resume(kind: type[Any]):
    def build(seed: int) -> tuple[nn.Module, GradMatch[Any]]:
        model = make_model(seed)
        method = SmoothFish(2.0, 0.1) if kind is SmoothFish else IDGM(model, 0.5, "variance")
        return model, GradMatch(muon_and_adamw(model), method)

    batches = make_batches(DOMAINS * 4)
    groups = [batches[i : i + DOMAINS] for i in range(0, len(batches), DOMAINS)]
    (whole, whole_optimizer), (model, optimizer), (again, optimizer_again) = build(0), build(0), build(1)
    for group in groups:
        whole_optimizer.meta_step(lambda batch: loss_of(whole, batch), group)
    for group in groups[:2]:
        optimizer.meta_step(lambda batch: loss_of(model, batch), group)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    again.load_state_dict(saved[0])
    optimizer_again.load_state_dict(saved[1])
    for group in groups[2:]:
        optimizer_again.meta_step(lambda batch: loss_of(again, batch), group)
    assert_identical(dict(again.named_parameters()), dict(whole.named_parameters()))
    assert_identical(optimizer_again.state_dict(), whole_optimizer.state_dict())


def without(name: str) -> Callable[[Any], Any]:
    return lambda state: {k: v for k, v in state.items() if k != name}


def shortened(state: Any) -> Any:
    return {**state, "optimizers": state["optimizers"][:1]}


def second_of_other_groups(state: Any) -> Any:
    """The first loads before the second refuses."""
    first, second = copy.deepcopy(state["optimizers"])
    second["param_groups"][0]["params"].pop()
    return {**state, "optimizers": [first, second]}


@pytest.mark.parametrize(
    ("build", "change", "message"),
    [
        (lambda m: [SGD(matrices(m), lr=0.1), AdamW(rest(m))], None, r"is of .*torch\.Muon.*wraps.*torch\.SGD"),
        (lambda m: muon_and_adamw(m)[::-1], None, r"Muon with torch\.AdamW.*AdamW with torch\.Muon: build the same"),
        (lambda m: [Muon(matrices(m)), AdamW(rest(m)[:1]), AdamW(rest(m)[1:])], None, r"AdamW with torch\.AdamW"),
        (lambda m: [AdamW(m.parameters())], None, "build the same optimizer"),
        (lambda m: AdamW(m.parameters()), None, "build the same optimizer"),
        (
            lambda m: [Muon(matrices(m)[:2]), AdamW([matrices(m)[2], *rest(m)])],
            None,
            "group 0 has 3 parameters in the state dict and 2 in this",
        ),
        (lambda m: [Muon(matrices(m)[::-1]), AdamW(rest(m))], None, r"parameter 0 has shape \[6, 4\]"),
        (muon_and_adamw, second_of_other_groups, "cannot load the state dict.*group"),
        (muon_and_adamw, without("optimizers"), "cannot load the state dict"),
        (muon_and_adamw, without("gradmatch"), "no 'gradmatch' entry"),
        (muon_and_adamw, shortened, "is of 1 optimizers and there are 2 here"),
        (muon_and_adamw, lambda state: {**state, "optimizers": None}, "cannot load the state dict"),
    ],
    ids=[
        "another",
        "order",
        "more",
        "fewer",
        "plain",
        "shared-out-otherwise",
        "shapes",
        "second-refuses",
        "no-entry",
        "not-ours",
        "shortened",
        "None",
    ],
)
def test_a_state_dict_of_others_is_refused_and_changes_nothing(build: Any, change: Any, message: str):
    saved_model = make_model(1)
    saved = GradMatch(muon_and_adamw(saved_model), fish())
    train(saved, saved_model, make_batches(4, seed=3))
    state = saved.state_dict() if change is None else change(in_format_3(saved))
    model, reference = make_model(), make_model()
    optimizer, beside = GradMatch(build(model), fish()), GradMatch(build(reference), fish())
    batches = make_batches(DOMAINS + 3)
    for one, of in ((optimizer, model), (beside, reference)):
        train(one, of, batches[:5])
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert_identical(everything(model, optimizer), before)
    for one, of in ((optimizer, model), (beside, reference)):
        train(one, of, batches[5:])
    assert_identical(everything(model, optimizer), everything(reference, beside))


def test_text_for_what_is_kept_of_a_parameter_is_refused_though_torch_loads_it():
    model = make_model()
    optimizer = GradMatch([SGD(matrices(model), lr=0.1), SGD(rest(model), lr=0.1, momentum=0.9)], fish())
    train(optimizer, model, make_batches(4))
    state = in_format_3(optimizer)
    state["optimizers"][1]["state"][0] = "text"
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="the state of a parameter should be a dictionary"):
        optimizer.load_state_dict(state)
    assert_identical(everything(model, optimizer), before)


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("inner_state", ["carry", "reset"])
def test_a_copy_goes_on_by_itself(through: Any, inner_state: str):
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state, track_alignment=True))
    scheduler = OneCycleLR(optimizer.optimizer.optimizers[0], max_lr=0.1, total_steps=40)  # type: ignore[attr-defined]
    batches = make_batches(DOMAINS + 5)
    train(optimizer, model, batches[:4], scheduler.step)
    copied, optimizer_copied = through((model, optimizer))
    assert optimizer_copied.optimizer.optimizers[0].param_groups[0]["params"][0] is matrices(copied)[0]
    assert optimizer_copied.param_groups == optimizer_copied.optimizer.param_groups
    before = everything(model, optimizer)
    train(optimizer_copied, copied, batches[4:])
    assert_identical(everything(model, optimizer), before)
    train(optimizer, model, batches[4:])
    assert_identical(everything(copied, optimizer_copied), everything(model, optimizer))


# -------------------------------------------------------------------------------------------------------- schedulers


def each(optimizers: Sequence[Optimizer]) -> list[Any]:
    muon, adamw = optimizers
    return [OneCycleLR(muon, max_lr=0.1, total_steps=15), CosineAnnealingLR(adamw, T_max=7)]


def one_cycle(optimizers: Sequence[Optimizer]) -> list[Any]:
    peaks = zip(optimizers, (0.1, 0.04), strict=True)
    return [OneCycleLR(one, max_lr=peak, total_steps=15, cycle_momentum=False) for one, peak in peaks]


SCHEDULES: dict[str, tuple[Callable[[Any], list[Any]], Callable[[Any], list[Any]]]] = {
    "each": (lambda o: each(o.optimizer.optimizers), each),
    "one-cycle": (lambda o: [OneCycleLR(o, max_lr=[0.1, 0.04], total_steps=15, cycle_momentum=False)], one_cycle),
    "of-several": (
        lambda o: [OneCycleLR(o.optimizer, max_lr=[0.1, 0.04], total_steps=15, cycle_momentum=False)],
        one_cycle,
    ),
    "cosine": (lambda o: [CosineAnnealingLR(o, T_max=7)], lambda os: [CosineAnnealingLR(one, T_max=7) for one in os]),
    "lambdas": (
        lambda o: [LambdaLR(o, [lambda t: 1 / (1 + t), lambda t: 0.9**t])],
        lambda os: [LambdaLR(os[0], lambda t: 1 / (1 + t)), LambdaLR(os[1], lambda t: 0.9**t)],
    ),
    "whole-and-one": (
        lambda o: [ExponentialLR(o, 0.9), OneCycleLR(o.optimizer.optimizers[1], max_lr=0.05, total_steps=15)],
        lambda os: [ExponentialLR(os[0], 0.9), ExponentialLR(os[1], 0.9), OneCycleLR(os[1], 0.05, total_steps=15)],
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("inner_state", ["carry", "reset"])
def test_schedulers_of_each_and_of_the_whole(schedule: str, inner_state: str):
    of_whole, by_hand = SCHEDULES[schedule]
    model, reference = make_model(), make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state))
    hand = ByHand(reference, muon_and_adamw(reference), INNER_STATES[inner_state][1])
    schedulers, plain = of_whole(optimizer), by_hand(hand.optimizers)
    for batch in make_batches(14):
        train(optimizer, model, [batch], lambda: [scheduler.step() for scheduler in schedulers])
        hand.train([batch], lambda: [scheduler.step() for scheduler in plain])
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [group["lr"] for one in hand.optimizers for group in one.param_groups]
        assert_same(model, optimizer, reference, hand.optimizers)


def test_momentum_is_cycled_where_all_call_it_the_same():
    model = make_model()
    mixed = GradMatch(muon_and_adamw(model))
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        OneCycleLR(mixed, max_lr=0.1, total_steps=10)
    optimizer = GradMatch([Muon(matrices(model)), SGD(rest(model), lr=0.1, momentum=0.5)])
    OneCycleLR(optimizer, max_lr=0.1, total_steps=10, max_momentum=0.75)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.75, 0.75]


@pytest.mark.parametrize(
    "inner_state",
    [
        "carry",
        "reset",
    ],
)
def test_a_scheduler_that_a_hook_steps(inner_state: str):
    """It changes the learning rate within the step of the whole, where otherwise only counters change."""
    model, reference = make_model(), make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state))
    hand = ByHand(reference, muon_and_adamw(reference), INNER_STATES[inner_state][1])
    for optimizers in (optimizer.optimizer.optimizers, hand.optimizers):  # type: ignore[attr-defined]
        scheduler = ExponentialLR(optimizers[0], 0.9)
        optimizers[0].register_step_post_hook(lambda *_, scheduler=scheduler: scheduler.step())
    for batch in make_batches(3 * DOMAINS):
        train(optimizer, model, [batch])
        hand.step(batch)
        assert_same(model, optimizer, reference, hand.optimizers)


def test_a_scheduler_that_a_hook_steps_and_a_meta_step_that_fails():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    muon = optimizer.optimizer.optimizers[0]  # type: ignore[attr-defined]
    scheduler = ExponentialLR(muon, 0.9)
    muon.register_step_post_hook(lambda *_: scheduler.step())
    batches = make_batches(DOMAINS)
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    poisoned = [*batches[:2], (batches[2][0] * float("nan"), batches[2][1])]
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="nan"):
        optimizer.meta_step(lambda batch: loss_of(model, batch), poisoned)
    assert_identical(everything(model, optimizer), before)
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)


# ------------------------------------------------------------------------------------------ groups in the middle, hooks


class Scaled(nn.Module):
    """A model with a parameter more, of which its optimizers learn late."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.model = make_model()
        self.extra = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=torch.float64).reshape(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x * self.extra.flatten())


@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_group_may_join_one_of_them_in_the_middle(place: int, inner_state: str):
    model, reference = (Scaled((2, 2) if place == 0 else (4,)) for _ in range(2))
    optimizer = GradMatch(muon_and_adamw(model.model), fish(inner_state))
    hand = ByHand(reference, muon_and_adamw(reference.model), INNER_STATES[inner_state][1])
    for index, batch in enumerate(make_batches(4 * DOMAINS)):
        if index == DOMAINS + 1:
            optimizer.optimizer.optimizers[place].add_param_group({"params": [model.extra], "lr": 0.03})  # type: ignore[attr-defined]
            hand.optimizers[place].add_param_group({"params": [reference.extra], "lr": 0.03})
            assert len(optimizer.param_groups) == 3
        train(optimizer, model, [batch])
        hand.step(batch)
        assert_same(model, optimizer, reference, hand.optimizers)
        if index == DOMAINS + 1:
            assert_identical(through_a_file(optimizer.state_dict()), optimizer.state_dict())
            optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def test_hooks_on_the_wrapper_on_the_whole_and_on_each():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    whole = optimizer.optimizer
    muon, adamw = whole.optimizers  # type: ignore[attr-defined]
    seen: list[str] = []
    for name, one in (("wrapper", optimizer), ("whole", whole), ("muon", muon), ("adamw", adamw)):
        one.register_step_pre_hook(lambda *_, name=name: seen.append(f"before {name}"))
        one.register_step_post_hook(lambda *_, name=name: seen.append(f"after {name}"))
    train(optimizer, model, make_batches(1))
    inside = ["before muon", "after muon", "before adamw", "after adamw"]
    once = ["before wrapper", "before whole", *inside, "after whole", "after wrapper"]
    assert seen == once
    optimizer.rollback()
    seen.clear()
    optimizer.meta_step(lambda batch: loss_of(model, batch), make_batches(DOMAINS))
    assert seen == once * DOMAINS


@pytest.mark.parametrize(
    "on",
    [
        "wrapper",
        "whole",
        "member",
    ],
)
def test_hooks_on_checkpoints(on: str):
    optimizer = GradMatch(muon_and_adamw(make_model()), fish())
    whole = optimizer.optimizer
    one = {"wrapper": optimizer, "whole": whole, "member": whole.optimizers[1]}[on]  # type: ignore[attr-defined]
    seen: list[str] = []
    one.register_state_dict_pre_hook(lambda _: seen.append("saving"))
    one.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    one.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    one.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saving", "saved", "loading", "loaded"]


# ----------------------------------------------------------------------------------------------------- loss scaling


@pytest.mark.parametrize("unscale", ["by step", "before, to clip"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_step_that_overflowed_is_skipped_by_both_and_counts(unscale: str, fused: bool):
    model, reference = make_model(), make_model()
    optimizer = GradMatch([Muon(matrices(model), lr=0.05), AdamW(rest(model), lr=0.02, fused=fused)], fish())
    hand = ByHand(reference, [Muon(matrices(reference), lr=0.05), AdamW(rest(reference), lr=0.02, fused=fused)])
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for index, batch in enumerate(make_batches(3 * DOMAINS)):
        overflows = index == 4
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        scaler.scale(loss * float("inf") if overflows else loss).backward()
        if unscale != "by step":
            scaler.unscale_(optimizer)
        before = copy.deepcopy(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        hand.step(batch, skipped=overflows)
        assert optimizer.inner_step == (index + 1) % DOMAINS
        if overflows:
            assert_identical(dict(model.state_dict()), dict(before))
        assert_same(model, optimizer, reference, hand.optimizers)
        assert not hasattr(optimizer.optimizer, "found_inf")
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("kind", [Fish, SmoothFish, IDGM])
def test_meta_step_with_a_scaler_is_meta_step_without(kind: type[Any]):
    models, reports = [make_model(), make_model()], []
    for model, scaler in zip(models, (None, GradScaler("cpu", init_scale=2.0**10)), strict=True):
        method = {Fish: Fish(META_LR), SmoothFish: SmoothFish(1.0, 2.0**-3), IDGM: IDGM(model, 0.5, "variance")}[kind]
        optimizer = GradMatch(muon_and_adamw(model), method)
        for seed in range(3):
            batches = make_batches(DOMAINS, seed)
            reports.append(optimizer.meta_step(lambda b, m=model: loss_of(m, b), batches, scaler=scaler))
    assert_identical(dict(models[0].named_parameters()), dict(models[1].named_parameters()))
    assert torch.equal(reports[2].losses, reports[5].losses)


# ---------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
@pytest.mark.parametrize("inner_state", ["carry", "reset"])
@pytest.mark.parametrize("how", ["nan", "raises", "second step raises"])
def test_a_meta_step_of_fish_that_fails_restores_both(how: str, inner_state: str, trained: bool):
    model, reference = make_model(), make_model()
    batches = make_batches(2 * DOMAINS)
    optimizer, beside = (GradMatch(muon_and_adamw(m), fish(inner_state)) for m in (model, reference))
    if trained:
        optimizer.meta_step(lambda batch: loss_of(model, batch), batches[:DOMAINS])
        beside.meta_step(lambda batch: loss_of(reference, batch), batches[:DOMAINS])
    before, calls = everything(model, optimizer), []

    def failing(batch: Batch) -> Tensor:
        calls.append(batch)
        if len(calls) == DOMAINS and how == "raises":
            raise RuntimeError("no such file")
        return loss_of(model, batch) * (float("nan") if len(calls) == DOMAINS and how == "nan" else 1.0)

    def refuse(*_: Any) -> None:
        if len(calls) == DOMAINS:
            raise RuntimeError("no such file")

    adamw = optimizer.optimizer.optimizers[1]  # type: ignore[attr-defined]
    hook = adamw.register_step_pre_hook(refuse if how == "second step raises" else lambda *_: None)
    with pytest.raises(ValueError if how == "nan" else RuntimeError, match="nan" if how == "nan" else "no such file"):
        optimizer.meta_step(failing, batches[DOMAINS:])
    hook.remove()
    assert_identical(everything(model, optimizer), before)
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches[DOMAINS:])
    beside.meta_step(lambda batch: loss_of(reference, batch), batches[DOMAINS:])
    assert_identical(everything(model, optimizer), everything(reference, beside))


@pytest.mark.parametrize("kind", [SmoothFish, IDGM])
def test_a_meta_step_of_the_others_that_fails_changes_neither(kind: type[Any]):
    model = make_model()
    method = SmoothFish(1.0, 0.1) if kind is SmoothFish else IDGM(model, 0.5, "variance")
    optimizer = GradMatch(muon_and_adamw(model), method)
    batches = make_batches(DOMAINS)
    optimizer.meta_step(lambda batch: loss_of(model, batch), batches)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="nan"):
        optimizer.meta_step(lambda b: loss_of(model, b) * (float("nan") if b is batches[2] else 1.0), batches)
    assert_identical(everything(model, optimizer), before)


@pytest.mark.filterwarnings("ignore:the inner optimizer's state held NaN")
def test_rollback_of_an_inner_loop_that_diverged_resets_both():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    batches = make_batches(DOMAINS)
    slow = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="the inner loop diverged"):
        train(optimizer, model, [*batches[:2], (batches[2][0] * float("nan"), batches[2][1])])
    optimizer.rollback()
    assert_identical(dict(model.state_dict()), dict(slow))
    assert all(not one.state for one in optimizer.optimizer.optimizers)  # type: ignore[attr-defined]
    train(optimizer, model, batches)


# ----------------------------------------------------------------------------- frozen parameters, schedule-free, repr


@pytest.mark.parametrize("frozen", ["one of each", "all matrices", "the rest"])
@pytest.mark.parametrize("inner_state", ["carry", "reset"])
def test_frozen_parameters_stay(frozen: str, inner_state: str):
    model, reference = make_model(), make_model()
    for one in (model, reference):
        of = {"one of each": [matrices(one)[1], rest(one)[0]], "all matrices": matrices(one), "the rest": rest(one)}
        for p in of[frozen]:
            p.requires_grad_(False)
    optimizer = GradMatch(muon_and_adamw(model), fish(inner_state, track_alignment=True))
    hand = ByHand(reference, muon_and_adamw(reference), INNER_STATES[inner_state][1])
    for batch in make_batches(2 * DOMAINS):
        train(optimizer, model, [batch])
        hand.step(batch)
        assert_same(model, optimizer, reference, hand.optimizers)
    for p, start in zip(model.parameters(), make_model().parameters(), strict=True):
        assert torch.equal(p, start) is not p.requires_grad


def schedule_free_and_sgd(model: nn.Module, place: int) -> list[Optimizer]:
    both = [pytorch_optimizer.ScheduleFreeAdamW(matrices(model), lr=0.05), SGD(rest(model), lr=0.1)]
    return both[::-1] if place else both


class BesideSGD(ByHand):
    """Fish around the schedule-free one alone, which treats it rightly, and SGD beside it by hand."""

    def __init__(self, model: nn.Module, place: int) -> None:
        both = schedule_free_and_sgd(model, place)
        self.free = GradMatch(both[place], fish())
        self.free.train()  # type: ignore[attr-defined]
        super().__init__(nn.ParameterList(rest(model)), [both[1 - place]])
        self.whole, self.both = model, both

    def step(self, batch: Batch, *, skipped: bool = False) -> None:
        self.whole.zero_grad()
        loss_of(self.whole, batch).backward()
        self.free.step()
        self.walk()


@pytest.mark.parametrize("place", [0, 1])
def test_schedule_free_beside_sgd(place: int):
    model, reference = make_model(), make_model()
    optimizer = GradMatch(schedule_free_and_sgd(model, place), fish())
    free = optimizer.optimizer.optimizers[place]  # type: ignore[attr-defined]
    optimizer.train()  # type: ignore[attr-defined]
    assert free.param_groups[0]["train_mode"]
    hand = BesideSGD(reference, place)
    for index, batch in enumerate(make_batches(4 * DOMAINS)):
        train(optimizer, model, [batch])
        hand.step(batch)
        assert_same(model, optimizer, reference, hand.both)
        if index == 2 * DOMAINS - 1:
            trained = copy.deepcopy(model.state_dict())
            optimizer.eval()  # type: ignore[attr-defined]
            hand.free.eval()  # type: ignore[attr-defined]
            assert not free.param_groups[0]["train_mode"]
            assert not torch.equal(model[0].weight, trained["0.weight"])
            assert torch.equal(model[0].bias, trained["0.bias"])
            assert_same(model, optimizer, reference, hand.both)
            optimizer.train()  # type: ignore[attr-defined]
            hand.free.train()  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", [0, 1])
def test_schedule_free_beside_sgd_in_the_middle_of_an_inner_loop(place: int):
    model = make_model()
    optimizer = GradMatch(schedule_free_and_sgd(model, place), fish())
    optimizer.train()  # type: ignore[attr-defined]
    batches = make_batches(DOMAINS + 4)
    train(optimizer, model, batches[: DOMAINS + 1])
    fast = everything(model, optimizer)
    with optimizer.slow_weights():
        optimizer.eval()  # type: ignore[attr-defined]
        loss_of(model, batches[0])
    assert_identical(everything(model, optimizer), fast)
    again = make_model(1)
    resumed = GradMatch(schedule_free_and_sgd(again, place), fish())
    resumed.train()  # type: ignore[attr-defined]
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(resumed, again, batches[DOMAINS + 1 :])
    train(optimizer, model, batches[DOMAINS + 1 :])
    assert_identical(dict(again.named_parameters()), dict(model.named_parameters()))
    assert_identical(resumed.state_dict(), optimizer.state_dict())
    optimizer.eval()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="switched to another mode in the middle of an inner loop"):
        optimizer.interpolate()


@pytest.mark.parametrize(
    "place",
    [0, 1],
)
def test_a_group_may_join_another_than_schedule_free_in_the_middle(place: int):
    model = Scaled((4,))
    optimizer = GradMatch(schedule_free_and_sgd(model.model, place), fish())
    optimizer.train()  # type: ignore[attr-defined]
    batches = make_batches(DOMAINS)
    train(optimizer, model, batches[:1])
    optimizer.optimizer.optimizers[1 - place].add_param_group({"params": [model.extra]})  # type: ignore[attr-defined]
    train(optimizer, model, batches[1:])
    assert optimizer.inner_step == 0


def test_train_and_eval_reach_nobody_where_nobody_has_them():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model))
    before = everything(model, optimizer)
    optimizer.eval()  # type: ignore[attr-defined]
    optimizer.train()  # type: ignore[attr-defined]
    assert_identical(everything(model, optimizer), before)


def test_repr_shows_all():
    model = make_model()
    members = muon_and_adamw(model)
    assert repr(GradMatch(members, fish())) == f"GradMatch(\n{members[0]!r}\n{members[1]!r},\n{fish()!r}\n)"


def test_a_parameter_that_joins_a_second_optimizer_later_is_refused_before_anything_moves():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    train(optimizer, model, make_batches(1))
    first, second = optimizer.optimizer.optimizers  # type: ignore[attr-defined]
    before = copy.deepcopy(model.state_dict())
    second.add_param_group({"params": [matrices(model)[1]]})
    with pytest.raises(ValueError, match=r"optimizer\[0\] and optimizer\[1\] hold the same parameter, number 3"):
        train(optimizer, model, make_batches(1))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(first.param_groups) == 1


def test_messages_call_them_by_their_names():
    model = make_model()
    optimizer = GradMatch(muon_and_adamw(model), fish())
    with pytest.raises(ValueError, match="the wrapped Muon with AdamW cannot load the state dict"):
        optimizer.load_state_dict({**optimizer.state_dict(), "optimizers": []})


def test_compare_takes_a_list():
    model, batches = make_model(), make_batches(DOMAINS)
    methods = {"Fish": Fish(), "SmoothFish": SmoothFish(1.0, 0.1)}
    found = compare(
        model, lambda b: loss_of(model, b), batches, methods, muon_and_adamw(model), rounds=2, orders=2, show=False
    )
    assert found["Fish"].error is None
    assert "Muon with AdamW" in str(found)
    with pytest.raises(ValueError, match="needs a closure"):
        compare(model, lambda b: loss_of(model, b), batches, optimizer=[torch.optim.LBFGS(model.parameters())])
