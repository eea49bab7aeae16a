"""An unmodified DomainBed: our algorithms beside its own, update by update, and through its own scripts.

Free running, two implementations can only be compared in double precision: Adam divides small gradients by their own
size, so one rounding of the interpolation in single precision grows within some updates.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from torch_gradmatch import Fishr, GradMatch, GroupDRO, VREx

CHECKOUT = os.path.abspath(os.environ.get("DOMAINBED_DIR", ""))
EXAMPLE = Path(__file__).parents[2] / "examples" / "domainbed"
pytestmark = [
    pytest.mark.skipif(
        "DOMAINBED_DIR" not in os.environ,
        reason="set DOMAINBED_DIR to a checkout of DomainBed: git clone https://github.com/facebookresearch/DomainBed",
    ),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module")
def bed() -> Iterator[SimpleNamespace]:
    """DomainBed's modules, with our algorithms registered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [CHECKOUT, str(EXAMPLE), *sys.path])
        names = ("algorithms", "command_launchers", "datasets", "hparams_registry")
        modules = {name: importlib.import_module(f"domainbed.{name}") for name in names}
        ours = importlib.import_module("domainbed_algorithms")
        ours.register()
        yield SimpleNamespace(**modules, ours=ours)


@pytest.fixture(autouse=True)
def without_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNets with random weights: the others would be downloaded."""
    build = torchvision.models.resnet18
    monkeypatch.setattr(torchvision.models, "resnet18", lambda pretrained: build(weights=None))


@pytest.fixture
def double() -> Iterator[None]:
    """In double precision; DomainBed builds networks in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def minibatches(shape: tuple[int, ...], domains: int, size: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        ((1 + 0.3 * i) * torch.randn(size, *shape, generator=generator), torch.randint(2, (size,), generator=generator))
        for i in range(domains)
    ]


def assert_same(theirs: nn.Module, ours: nn.Module, *, rtol: float, atol: float) -> None:
    """Check parameters and floating-point buffers, all of them."""
    states = [
        {name: value for name, value in network.state_dict().items() if value.is_floating_point()}
        for network in (ours, theirs)
    ]
    torch.testing.assert_close(*states, rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------- beside DomainBed's classes

SHAPES = {"small CNN": (3, 28, 28), "wide ResNet": (3, 32, 32), "ResNet-18": (3, 224, 224)}


def pair_of_fish(bed: SimpleNamespace, network: str, domains: int, **settings: Any) -> list[Any]:
    hparams = bed.hparams_registry.default_hparams("GradMatchFish", "Debug28")
    hparams |= {"resnet18": True, "resnet50_augmix": False, **settings}
    pair = []
    for name in ("Fish", "GradMatchFish"):
        torch.manual_seed(0)
        pair.append(bed.algorithms.get_algorithm_class(name)(SHAPES[network], 2, domains, hparams))
    assert_same(pair[0].network, pair[1].network, rtol=0.0, atol=0.0)
    return pair


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("network", "settings", "domains", "size", "updates", "rtol"),
    [
        pytest.param("small CNN", {}, 3, 4, 20, 1e-11, id="small CNN"),
        pytest.param("small CNN", {"meta_lr": 0.05, "weight_decay": 1e-3}, 2, 4, 20, 1e-11, id="meta_lr 0.05"),
        # BatchNorm over few values: a rounding grows by 5 digits.
        pytest.param("wide ResNet", {}, 2, 3, 20, 1e-6, id="wide ResNet"),
        pytest.param("ResNet-18", {"lr": 5e-5}, 2, 2, 3, 1e-11, id="ResNet-18"),
        pytest.param("ResNet-18", {"lr": 5e-5, "freeze_bn": True}, 2, 1, 2, 1e-11, id="ResNet-18, freeze_bn"),
    ],
)
def test_fish_is_domainbeds(
    bed: SimpleNamespace, network: str, settings: dict, domains: int, size: int, updates: int, rtol: float
):
    theirs, ours = pair_of_fish(bed, network, domains, **settings)
    before = copy.deepcopy(ours.network)
    for update in range(updates):
        batches = minibatches(SHAPES[network], domains, size, update)
        theirs.update(batches)
        assert ours.update(batches)["loss"] > 0
        assert_same(theirs.network, ours.network, rtol=rtol, atol=rtol / 100)
    for name, counter in ours.network.state_dict().items():  # an integer is not interpolated here
        assert counter.is_floating_point() or counter == (0 if "freeze_bn" in settings else updates * domains), name
    with pytest.raises(AssertionError):  # it is not that nothing moved
        assert_same(before, ours.network, rtol=1e-6, atol=1e-8)
    adam, expected = ours.optimizer.optimizer.state_dict()["state"], theirs.optimizer_inner_state["state"]
    assert adam.keys() == expected.keys()
    for position, entry in expected.items():
        assert adam[position]["step"] == entry["step"] == updates * domains
        torch.testing.assert_close(adam[position]["exp_avg"], entry["exp_avg"], rtol=rtol * 1e3, atol=rtol)


HPARAMS = {
    "mlp_width": 16, "mlp_depth": 3, "mlp_dropout": 0.0, "nonlinear_classifier": False, "lr": 0.01, "weight_decay": 0.0,
    "ema": 0.95, "lambda": 1000.0, "groupdro_eta": 0.1, "vrex_lambda": 3.0, "vrex_penalty_anneal_iters": 0,
}  # fmt: skip
METHODS = {
    "Fishr": lambda network, start: Fishr(network, network[1], HPARAMS["lambda"], start=start),
    "VREx": lambda network, _: VREx(HPARAMS["vrex_lambda"]),
    "GroupDRO": lambda network, _: GroupDRO(HPARAMS["groupdro_eta"]),
}


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "start"), [("Fishr", 0), ("Fishr", 7), ("VREx", 0), ("GroupDRO", 0)])
def test_a_method_is_domainbeds_class_over_twenty_updates(
    bed: SimpleNamespace, name: str, start: int, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("backpack", reason="backpack-for-pytorch is not installed")
    # BackPACK's hooks are on the inputs of a layer, to which backward(inputs=parameters) does not go in newer torch.
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, *args, inputs=None, **named: backward(self, *args, **named)
    )
    torch.manual_seed(0)
    theirs = getattr(bed.algorithms, name)((5,), 2, 4, HPARAMS | {"penalty_anneal_iters": start})
    network: Any = copy.deepcopy(theirs.network)
    theirs._init_optimizer = lambda: None  # theirs is made anew when the penalty begins
    optimizer = GradMatch(torch.optim.Adam(network.parameters(), lr=0.01), METHODS[name](network, start))
    if name == "VREx":  # makes its optimizer anew in the update whose number this is
        monkeypatch.setattr(torch.optim, "Adam", lambda *_, **__: theirs.optimizer)
    for number in range(20):
        batches = minibatches((5,), 4, 12, number)
        theirs.update(batches)
        optimizer.meta_step(lambda batch: nn.functional.cross_entropy(network(batch[0]), batch[1]), batches)
        assert_same(theirs.network, network, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------ through DomainBed's scripts


@pytest.fixture
def train(bed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """``train.py``, to be called in this process: without the 64 workers of a run, which take 20 seconds."""
    spec = importlib.util.spec_from_file_location("domainbed_train", EXAMPLE / "train.py")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(bed.datasets.MultipleDomainDataset, "N_WORKERS", 0)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(bed.command_launchers, "REGISTRY", dict(bed.command_launchers.REGISTRY))
    return module


def run_script(train: ModuleType, *arguments: str) -> None:
    # DomainBed's scripts put their own streams in place of the standard ones and leave them there.
    with contextlib.redirect_stdout(sys.stdout), contextlib.redirect_stderr(sys.stderr):
        train.main(["--domainbed", CHECKOUT, *arguments])


def read_records(output: Path) -> list[dict]:
    assert (output / "done").read_text() == "done"
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


RESNET = {"batch_size": 2, "resnet18": True, "resnet50_augmix": False, "freeze_bn": True, "resnet_dropout": 0.1}


@pytest.mark.parametrize(
    ("name", "dataset", "hparams"),
    [
        ("GradMatchFish", "Debug28", {"batch_size": 6}),
        ("GradMatchSmoothFish", "Debug28", {"batch_size": 6}),
        ("GradMatchIDGMInnerProduct", "Debug28", {"batch_size": 6}),
        ("GradMatchIDGMCosine", "Debug28", {"batch_size": 6}),
        ("GradMatchIDGMVariance", "Debug224", RESNET),
    ],
)
def test_domainbeds_training_script(
    bed: SimpleNamespace, train: ModuleType, tmp_path: Path, name: str, dataset: str, hparams: dict[str, Any]
):
    run_script(
        train, "--algorithm", name, "--dataset", dataset, "--test_envs", "1", "--output_dir", str(tmp_path),
        "--steps", "5", "--checkpoint_freq", "2", "--hparams", json.dumps(hparams),
    )  # fmt: skip
    records = read_records(tmp_path)
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all(np.isfinite(record["loss"]) for record in records)
    assert all(("cosine" in record) == (name != "GradMatchFish") for record in records)
    assert records[0]["hparams"].keys() >= bed.ours.ALGORITHMS[name].HPARAMS.keys()
    # Its checkpoint goes on with Adam's step count.
    saved = torch.load(tmp_path / "model.pkl", weights_only=True)
    shape, domains = tuple(saved["model_input_shape"]), saved["model_num_domains"]
    algorithm = getattr(bed.algorithms, name)(shape, saved["model_num_classes"], domains, saved["model_hparams"])
    algorithm.load_state_dict(saved["model_dict"], strict=True)
    steps = {int(entry["step"]) for entry in algorithm.optimizer.optimizer.state.values()}
    assert steps == {5 * domains if name == "GradMatchFish" else 5}
    assert np.isfinite(algorithm.update(minibatches(shape, domains, 4, 0))["loss"])
    if hparams is RESNET:
        assert torch.equal(algorithm.network.net[0].network.bn1.running_mean, torch.zeros(64))  # frozen


def test_sweep_and_its_table(
    bed: SimpleNamespace, train: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    commands: list[str] = []
    bed.command_launchers.REGISTRY["collecting"] = commands.extend
    algorithms = ["GradMatchFish", "GradMatchIDGMCosine", "ERM"]
    run_script(
        train, "--script", "sweep", "launch", "--datasets", "Debug28", "--algorithms", *algorithms,
        "--output_dir", str(tmp_path), "--data_dir", "none", "--command_launcher", "collecting", "--steps", "2",
        "--n_hparams", "2", "--n_trials", "1", "--single_test_envs", "--skip_confirmation",
        "--hparams", '{"batch_size": 3, "track_alignment": true}',
    )  # fmt: skip
    assert len(commands) == 3 * 3 * 2
    in_its_own_process = subprocess.run(shlex.split(commands[0]), capture_output=True, text=True, timeout=300)
    assert in_its_own_process.returncode == 0, in_its_own_process.stderr
    assert "inner_produc" in in_its_own_process.stdout  # DomainBed cuts its column heads
    for command in commands[1:]:
        python, script, *arguments = shlex.split(command)
        assert (python, Path(script).resolve()) == (sys.executable, EXAMPLE / "train.py")
        assert arguments[:2] == ["--domainbed", str(Path(CHECKOUT).resolve())]
        run_script(train, *arguments[2:])
    capsys.readouterr()
    run_script(train, "--script", "collect_results", "--input_dir", str(tmp_path))
    table = capsys.readouterr().out
    for algorithm in algorithms:
        assert re.search(rf"^{algorithm}\s+\d+\.\d", table, re.MULTILINE), table
