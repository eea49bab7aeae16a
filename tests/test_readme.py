"""Every Python block of the README runs, in order, and its diff changes one line."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_gradmatch import DomainBatchSampler

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


class Writer:
    """As ``torch.utils.tensorboard.SummaryWriter``."""

    def __init__(self) -> None:
        self.logged: dict[str, tuple[float, int]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.logged[name] = (value, step)


def test_every_python_block_runs(tmp_path: Path, capsys, monkeypatch):
    """In one namespace, with what a user has already: a model, a criterion, data of three hospitals."""
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(288, 4), torch.randint(2, (288,)))
    hospitals = [("north", "south", "west")[i % 3] for i in range(288)]
    namespace = {
        "torch": torch,
        "model": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        "criterion": nn.functional.cross_entropy,
        "dataset": dataset,
        "hospital_of_each_sample": hospitals,
        "loader": DataLoader(dataset, batch_sampler=DomainBatchSampler(hospitals, batch_size=16)),
        "checkpoint": tmp_path / "checkpoint.pt",
        "endless_loader_of": lambda name: DataLoader(dataset, batch_size=len(name)),
        "writer": Writer(),
        "step": 7,
    }
    before = [p.detach().clone() for p in namespace["model"].parameters()]
    code = blocks("python")
    assert len(code) == 17
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)  # as torchrun does
    try:
        for number, block in enumerate(code):
            exec(compile(block, f"README block {number}", "exec"), namespace)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert not any(torch.equal(a, b) for a, b in zip(before, namespace["model"].parameters(), strict=True))
    assert namespace["optimizer"].inner_step == 0
    logged = namespace["writer"].logged
    assert {"train/loss", "train/cosine", "train/loss/north", "train/grad_norm/west"} <= set(logged)
    assert all(isinstance(value, float) and step == 7 for value, step in logged.values())
    assert capsys.readouterr().out.count("tensor(") >= 4


def test_the_loop_differs_from_an_ordinary_one_in_one_line():
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    removed, added = ([line[1:] for line in lines if line.startswith(sign)] for sign in "-+")
    assert len(removed) == len(added) == 1
    assert removed[0].removeprefix("optimizer = ") in added[0]
    first_use = re.sub(r"  #.*", "", next(block for block in blocks("python") if "GradMatch" in block))
    assert "\n".join([added[0], *(line[1:] for line in lines if line.startswith(" "))]) in first_use


def test_every_command_and_file_it_names_exists():
    text = README.read_text()
    makefile = (README.parent / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", text)) - {"and"}:
        assert f"\n{target}:" in makefile, target
    headings = {
        re.sub(r"[^a-z ]", "", line.lower()).strip().replace(" ", "-") for line in text.splitlines() if line[:1] == "#"
    }
    ignored = [line.strip("/") for line in (README.parent / ".gitignore").read_text().split()]
    for name in re.findall(r"!?\[[^]]*\]\((?!http)([^)]+)\)", text):
        assert not any(name.startswith(f"{folder}/") for folder in ignored), f"{name} is in no clone"
        assert name.removeprefix("#") in headings if name[0] == "#" else (README.parent / name).exists(), name
