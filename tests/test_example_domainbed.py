"""The algorithms for DomainBed, on a stand-in of its interface; the real one is for ``tests/ecosystem``."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from torch_gradmatch import GradMatch, MetaStep

EXAMPLE = Path(__file__).parents[1] / "examples" / "domainbed"
NAMES = [
    "GradMatchFish",
    "GradMatchSmoothFish",
    "GradMatchIDGMInnerProduct",
    "GradMatchIDGMVariance",
    "GradMatchIDGMCosine",
]

# What of DomainBed the algorithms and train.py touch, and no more.
STAND_IN = {
    "__init__.py": "",
    "lib/__init__.py": "",
    "scripts/__init__.py": "",
    "datasets.py": "",
    "lib/misc.py": """
import zlib

def seed_hash(*args):
    return zlib.crc32(repr(args).encode())
""",
    "networks.py": """
import torch

class WholeFish(torch.nn.Module):
    def __init__(self, input_shape, num_classes, hparams, weights=None):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(input_shape[0], 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Dropout(
                hparams["dropout"]), torch.nn.Linear(8, num_classes))

    def forward(self, x):
        return self.net(x)
""",
    "algorithms.py": """
import torch

ALGORITHMS = ["Fish"]

def get_algorithm_class(name):
    return globals()[name]

class Algorithm(torch.nn.Module):
    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__()
        self.hparams = hparams

class Fish(Algorithm):
    pass
""",
    "hparams_registry.py": """
def _hparams(algorithm, dataset, random_seed):
    hparams = {"lr": (1e-2, 1e-3 * (1 + random_seed)), "weight_decay": (0.0, 1e-4), "dropout": (0.0, 0.1)}
    if algorithm == "Fish":
        hparams["meta_lr"] = (0.5, 0.1)
    return hparams

def default_hparams(algorithm, dataset):
    return {name: default for name, (default, _) in _hparams(algorithm, dataset, 0).items()}

def random_hparams(algorithm, dataset, seed):
    return {name: drawn for name, (_, drawn) in _hparams(algorithm, dataset, seed).items()}
""",
    "command_launchers.py": """
def _print(commands):
    for command in commands:
        print(command)

REGISTRY = {"print": _print}
""",
    "scripts/train.py": """
import argparse, json, torch
from domainbed import algorithms, hparams_registry

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the stand-in's training")
    parser.add_argument("--algorithm")
    parser.add_argument("--data_dir")
    parser.add_argument("--test_envs", type=int, nargs="+")
    parser.add_argument("--hparams", type=json.loads, default={})
    parser.add_argument("--output")
    args = parser.parse_args()
    hparams = {**hparams_registry.default_hparams(args.algorithm, "Data"), **args.hparams}
    torch.manual_seed(0)
    algorithm = algorithms.get_algorithm_class(args.algorithm)((4,), 3, 2, hparams)
    algorithm.to("cpu")
    for _ in range(3):
        print(algorithm.update([(torch.randn(5, 4), torch.arange(5) % 3) for _ in range(2)], None))
    torch.save({"args": vars(args), "hparams": hparams, "model_dict": algorithm.state_dict()}, args.output)
""",
    "scripts/sweep.py": """
import sys
from domainbed import algorithms, command_launchers

if __name__ == "__main__":
    command_launchers.REGISTRY["print"]([sys.argv[1] + " --algorithm " + name for name in algorithms.ALGORITHMS])
""",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("a checkout")
    for name, text in STAND_IN.items():
        file = root / "domainbed" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.fixture(scope="module")
def bed(checkout: Path) -> Iterator[SimpleNamespace]:
    """The stand-in's modules, and ours, registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        patch.syspath_prepend(str(checkout))
        names = ("algorithms", "hparams_registry", "networks")
        modules = {name: importlib.import_module(f"domainbed.{name}") for name in names}
        misc = importlib.import_module("domainbed.lib.misc")
        ours = importlib.import_module("domainbed_algorithms")
        ours.register()
        yield SimpleNamespace(**modules, misc=misc, ours=ours)
    for name in [n for n in sys.modules if n.split(".")[0] in ("domainbed", "domainbed_algorithms")]:
        del sys.modules[name]


def build(bed: SimpleNamespace, name: str, *, domains: int = 3, seed: int = 0, **hparams) -> nn.Module:
    hparams = bed.hparams_registry.default_hparams(name, "Data") | hparams
    torch.manual_seed(seed)
    return bed.algorithms.get_algorithm_class(name)((4,), 3, domains, hparams)


def draw(seed: int, domains: int = 3, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 4, generator=generator).to(dtype) + d, torch.randint(0, 3, (6,), generator=generator))
        for d in range(domains)
    ]


def assert_identical(first: nn.Module, second: nn.Module) -> None:
    states = [algorithm.network.state_dict() for algorithm in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# ----------------------------------------------------------------------------------------------------- the algorithms


def test_fish_keeps_adams_state_and_interpolates_network_and_statistics(bed: SimpleNamespace):
    ours = build(bed, "GradMatchFish", meta_lr=0.3, weight_decay=0.01).double()
    slow = copy.deepcopy(ours.network)
    state = None
    for update in range(10):
        batches = draw(update, dtype=torch.float64)
        fast = copy.deepcopy(slow)
        adam = torch.optim.Adam(fast.parameters(), lr=1e-2, weight_decay=0.01)
        if state is not None:
            adam.load_state_dict(state)
        losses = []
        for x, y in batches:
            loss = nn.functional.cross_entropy(fast(x), y)
            adam.zero_grad()
            loss.backward()
            adam.step()
            losses.append(loss.item())
        state = copy.deepcopy(adam.state_dict())
        walked = fast.state_dict()
        slow.load_state_dict({k: v + 0.3 * (walked[k] - v) for k, v in slow.state_dict().items()})
        measured = ours.update(batches)
        expected = {"loss": sum(losses) / 3} | {f"loss/{domain}": loss for domain, loss in enumerate(losses)}
        assert measured == pytest.approx(expected, rel=1e-12)
        for name, value in slow.state_dict().items():
            found = ours.network.state_dict()[name]
            if name.endswith("num_batches_tracked"):
                assert int(found) == 3 * (update + 1)  # an integer is not interpolated
            else:
                torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-12)


def test_fish_logs_alignment_if_asked(bed: SimpleNamespace):
    measured = build(bed, "GradMatchFish", track_alignment=True).update(draw(0))
    each = {f"{name}/{domain}" for name in ("loss", "grad_norm") for domain in range(3)}
    assert measured.keys() == each | {"loss", "grad_norm", "inner_product", "cosine"}
    assert -1 <= measured["cosine"] <= 1
    assert measured["cosine"] * measured["inner_product"] > 0


@pytest.mark.parametrize("agreement", ["inner_product", "variance", "cosine"])
def test_idgm_steps_along_the_gradient_of_the_exact_objective(bed: SimpleNamespace, agreement: str):
    name = "GradMatchIDGM" + "".join(word.title() for word in agreement.split("_"))
    ours = build(bed, name, **({"gamma": 0.05} if agreement == "inner_product" else {"strength": 0.2})).double()
    other = copy.deepcopy(ours)
    batches = draw(3, dtype=torch.float64)
    parameters = list(other.network.parameters())
    losses = [nn.functional.cross_entropy(other.network(x), y) for x, y in batches]
    gradients = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]) for loss in losses
    ]
    pairs = [(i, j) for i in range(3) for j in range(i)]
    stacked = torch.stack(gradients)
    phi = {
        "inner_product": sum(stacked[i] @ stacked[j] for i, j in pairs) / 3,
        "variance": -(stacked - stacked.mean(0)).square().sum() / 3,
        "cosine": sum(nn.functional.cosine_similarity(stacked[i], stacked[j], dim=0) for i, j in pairs) / 3,
    }[agreement]
    measured = ours.update(batches)
    if agreement == "inner_product":
        assert measured["gamma"] == 0.05
    else:
        matching = torch.cat([g.flatten() for g in torch.autograd.grad(phi, parameters, retain_graph=True)])
        assert measured["gamma"] * matching.norm() == pytest.approx(0.2 * float(stacked.mean(0).norm().detach()))
    adam = torch.optim.Adam(parameters, lr=1e-2)
    (torch.stack(losses).mean() - measured["gamma"] * phi).backward()
    adam.step()
    assert measured["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-10)
    for p, q in zip(ours.network.parameters(), parameters, strict=True):
        # Adam's first step is lr g / (|g| + eps): the bias before BatchNorm has a gradient of rounding errors only
        significant = q.grad.abs() > 1e-6
        torch.testing.assert_close(p[significant], q[significant], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-12)


def test_smooth_fish_draws_the_order_of_the_domains(bed: SimpleNamespace):
    ours = build(bed, "GradMatchSmoothFish")
    orders, meta_step = set(), GradMatch.meta_step

    def record(optimizer: GradMatch, loss_fn: Callable, batches: dict) -> MetaStep:
        orders.add(tuple(batches))
        assert all(torch.equal(x, data[domain][0]) for domain, (x, _) in batches.items())
        return meta_step(optimizer, loss_fn, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradMatch, "meta_step", record)
        for update in range(40):
            data = draw(update)
            measured = ours.update(data)
            losses = ours.optimizer.last_meta_step.losses.tolist()
            named = dict(zip(ours.optimizer.last_meta_step.domains, losses, strict=True))
            assert {domain: measured[f"loss/{domain}"] for domain in range(3)} == named
    assert len(orders) == 6
    assert all(sorted(order) == [0, 1, 2] for order in orders)


@pytest.mark.parametrize("name", NAMES)
class TestEveryAlgorithm:
    def test_an_update_logs_numbers_and_learns(self, bed: SimpleNamespace, name: str):
        ours = build(bed, name)
        before = copy.deepcopy(ours)
        logged = [ours.update(draw(0), None) for _ in range(60)]
        assert all(type(value) is float for measured in logged for value in measured.values())
        assert ("cosine" in logged[0]) == ("inner_product" in logged[0]) == (name != "GradMatchFish")
        assert logged[-1]["loss"] < 0.7 * logged[0]["loss"]
        assert not torch.equal(before.predict(draw(1)[0][0]), ours.predict(draw(1)[0][0]))

    def test_a_checkpoint_goes_on_bit_for_bit(self, bed: SimpleNamespace, name: str, tmp_path: Path):
        ours = build(bed, name)
        for update in range(3):
            ours.update(draw(update))
        torch.save(ours.state_dict(), tmp_path / "model.pkl")
        other = build(bed, name, seed=1)
        other.load_state_dict(torch.load(tmp_path / "model.pkl", weights_only=True), strict=True)
        for algorithm in (ours, other):
            algorithm.eval()
        assert torch.equal(ours.predict(draw(9)[0][0]), other.predict(draw(9)[0][0]))
        for update in range(3):
            for algorithm in (ours, other):
                algorithm.train()
                torch.manual_seed(update)
                algorithm.update(draw(update))
            assert_identical(ours, other)

    def test_a_copy_is_independent_and_the_same(self, bed: SimpleNamespace, name: str):
        ours = build(bed, name, dropout=0.2)
        ours.update(draw(0))
        other, untouched = copy.deepcopy(ours), copy.deepcopy(ours.network.state_dict())
        torch.manual_seed(5)
        other.update(draw(1))
        for key, value in ours.network.state_dict().items():
            assert torch.equal(value, untouched[key]), key
        torch.manual_seed(5)
        ours.update(draw(1))
        assert_identical(ours, other)

    def test_the_optimizers_state_moves_with_the_network(self, bed: SimpleNamespace, name: str):
        # As train.py does it on a GPU: build, load a checkpoint, then .to(device). A dtype stands for the device.
        saved = build(bed, name)
        saved.update(draw(0))
        ours = build(bed, name, seed=1)
        ours.load_state_dict(saved.state_dict())
        ours.to(torch.float64)
        assert {e["exp_avg"].dtype for e in ours.optimizer.optimizer.state.values()} == {torch.float64}
        ours.update(draw(1, dtype=torch.float64))
        assert {int(e["step"]) for e in ours.optimizer.optimizer.state.values()} == {6 if name == NAMES[0] else 2}

    def test_the_first_weights_are_the_networks_own(self, bed: SimpleNamespace, name: str):
        ours = build(bed, name, seed=3)
        torch.manual_seed(3)
        expected = bed.networks.WholeFish((4,), 3, ours.hparams)
        for p, q in zip(ours.network.parameters(), expected.parameters(), strict=True):
            assert torch.equal(p, q)


def test_one_training_domain(bed: SimpleNamespace):
    assert build(bed, "GradMatchFish", domains=1).update(draw(0, domains=1))["loss"] > 0
    for name in NAMES[1:]:
        with pytest.raises(ValueError, match=rf"num_domains should be at least 2 for {name} \(got 1\).*--test_envs"):
            build(bed, name, domains=1)


def test_a_checkpoint_of_another_algorithm_is_refused(bed: SimpleNamespace):
    fish = build(bed, "GradMatchFish")
    with pytest.raises(ValueError, match="saved by method 'IDGM'; this optimizer uses Fish"):
        fish.load_state_dict(build(bed, "GradMatchIDGMVariance").state_dict())


# ------------------------------------------------------------------------------------------------ hyperparameters


@pytest.mark.parametrize("name", NAMES)
def test_hyperparameters_are_added_to_domainbeds(bed: SimpleNamespace, name: str):
    registry, own = bed.hparams_registry, bed.ours.ALGORITHMS[name].HPARAMS
    assert registry.default_hparams(name, "Data").keys() == {"lr", "weight_decay", "dropout"} | own.keys()
    assert registry.default_hparams("ERM", "Data").keys() == {"lr", "weight_decay", "dropout"}
    assert registry.default_hparams("Fish", "Data")["meta_lr"] == 0.5
    drawn = [registry.random_hparams(name, "Data", seed) for seed in range(30)]
    assert drawn[7] == registry.random_hparams(name, "Data", 7)
    assert drawn[7]["lr"] == pytest.approx(8e-3)  # the registry's own entry is as it was
    assert json.loads(json.dumps(drawn)) == drawn
    for hparams in [registry.default_hparams(name, "Data"), *drawn]:
        torch.manual_seed(0)
        bed.algorithms.get_algorithm_class(name)((4,), 3, 2, hparams)  # in range, all of them
    varied = {key for key in own if len({hparams[key] for hparams in drawn}) > 1}
    expected = {"GradMatchFish": {"meta_lr"}, "GradMatchSmoothFish": {"gamma", "inner_lr"}}
    expected["GradMatchIDGMInnerProduct"] = {"gamma"}
    assert varied == expected.get(name, {"strength"})


def test_hyperparameters_are_drawn_by_domainbeds_scheme(bed: SimpleNamespace):
    import numpy as np

    generator = np.random.RandomState(bed.misc.seed_hash(11, "strength"))
    strength = bed.hparams_registry.random_hparams("GradMatchIDGMVariance", "Data", 11)["strength"]
    assert strength == 10 ** generator.uniform(-1.5, -0.5)
    choices = {bed.hparams_registry.random_hparams("GradMatchFish", "Data", s)["meta_lr"] for s in range(40)}
    assert choices == {0.05, 0.1, 0.5}


def test_a_missing_hyperparameter_is_named(bed: SimpleNamespace):
    hparams = bed.hparams_registry.default_hparams("ERM", "Data")
    with pytest.raises(ValueError, match=r"hparams lacks 'strength'.*default_hparams\('GradMatchIDGMCosine'"):
        bed.ours.GradMatchIDGMCosine((4,), 3, 2, hparams)


def test_registering(bed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    wrapped = bed.hparams_registry._hparams
    bed.ours.register()
    assert ["Fish", *NAMES] == bed.algorithms.ALGORITHMS
    assert bed.hparams_registry._hparams is wrapped
    monkeypatch.setattr(bed.algorithms, "GradMatchFish", object)
    with pytest.raises(RuntimeError, match="has an algorithm 'GradMatchFish' of its own"):
        bed.ours.register()


# ------------------------------------------------------------------------------------------------------- train.py


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE / "train.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_training_script(checkout: Path, bed: SimpleNamespace, tmp_path: Path):
    output = tmp_path / "model.pkl"
    done = run(
        "--algorithm", "GradMatchIDGMVariance", "--domainbed", checkout, "--data_dir", "some where", "--test_envs",
        "0", "2", "--hparams", '{"strength": 0.5}', "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'cosine'") == 3
    saved = torch.load(output, weights_only=True)
    assert saved["args"]["data_dir"] == "some where"
    assert saved["args"]["test_envs"] == [0, 2]
    assert saved["hparams"]["strength"] == 0.5
    ours = bed.ours.GradMatchIDGMVariance((4,), 3, 2, saved["hparams"])
    ours.load_state_dict(saved["model_dict"], strict=True)
    assert {int(entry["step"]) for entry in ours.optimizer.optimizer.state.values()} == {3}


def test_a_sweeps_jobs_come_back_here(checkout: Path):
    here = f"{sys.executable} {EXAMPLE / 'train.py'} --domainbed '{checkout}'"
    done = run("--domainbed", checkout, "--script", "sweep", "python -m domainbed.scripts.train")
    assert done.stdout.splitlines() == [f"{here} --algorithm {name}" for name in ["Fish", *NAMES]], done.stderr


def test_jobs_of_an_unknown_form_are_refused(checkout: Path):
    spec = importlib.util.spec_from_file_location("domainbed_train", EXAMPLE / "train.py")
    assert spec is not None
    assert spec.loader is not None
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)
    launched: list[str] = []
    launch = train.launch_here(launched.extend, checkout)
    with pytest.raises(RuntimeError, match=r"does not begin with 'python -m domainbed.scripts.train ': torchrun"):
        launch(["python -m domainbed.scripts.train --algorithm ERM", "torchrun train.py"])
    assert launched == []


def test_help_is_ours_without_a_checkout_and_the_scripts_with_one(checkout: Path):
    assert "collect_results" in run("--help").stdout
    assert "the stand-in's training" in run("--domainbed", checkout, "--help").stdout


def without(checkout: Path, tmp_path: Path, file: str, text: str | None) -> Path:
    """A copy of the stand-in in which one file has another text, or is not there."""
    for name, original in STAND_IN.items():
        target = tmp_path / "domainbed" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(original)
    if text is None:
        (tmp_path / "domainbed" / file).unlink()
    else:
        (tmp_path / "domainbed" / file).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("networks.py", "import timm_that_is_not_here.models", "pip install timm_that_is_not_here"),
        ("datasets.py", "raise ModuleNotFoundError(name='PIL.Image')", "pip install pillow"),
        ("hparams_registry.py", None, "is no complete checkout of DomainBed"),
        ("algorithms.py", None, "is no checkout of DomainBed: it has no domainbed/algorithms.py"),
    ],
    ids=["dependency", "dependency of another name", "incomplete", "something else"],
)
def test_what_is_missing_is_said_without_a_traceback(
    checkout: Path, tmp_path: Path, file: str, text: str | None, expected: str
):
    done = run("--domainbed", without(checkout, tmp_path, file, text), "--algorithm", "GradMatchFish")
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_checkout_is_said_with_how_to_get_one(tmp_path: Path):
    for arguments in ([], ["--domain", tmp_path], ["--domainbed", tmp_path / "nowhere"]):
        done = run(*arguments, "--algorithm", "GradMatchFish")
        assert done.returncode == 2
        assert "is missing" in done.stderr
        assert "git clone https://github.com/facebookresearch/DomainBed" in done.stderr
        assert "Traceback" not in done.stderr
