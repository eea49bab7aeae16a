"""Fishr, VREx and GroupDRO against the classes of an unmodified DomainBed, update by update in double precision."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from torch_gradmatch import Fishr, GradMatch, GroupDRO, VREx

CHECKOUT = os.environ.get("DOMAINBED_DIR") and os.path.abspath(os.environ["DOMAINBED_DIR"])
pytestmark = [
    pytest.mark.skipif(
        not CHECKOUT,
        reason="set DOMAINBED_DIR to a checkout of DomainBed: git clone https://github.com/facebookresearch/DomainBed",
    ),
    pytest.mark.filterwarnings("ignore"),
]
HPARAMS = {
    "mlp_width": 16, "mlp_depth": 3, "mlp_dropout": 0.0, "nonlinear_classifier": False, "lr": 0.01, "weight_decay": 0.0,
    "ema": 0.95, "lambda": 1000.0, "penalty_anneal_iters": 0, "groupdro_eta": 0.1, "vrex_lambda": 3.0,
    "vrex_penalty_anneal_iters": 0,
}  # fmt: skip
METHODS = {
    "Fishr": lambda network: Fishr(network, network[1], HPARAMS["lambda"], start=HPARAMS["penalty_anneal_iters"]),
    "VREx": lambda network: VREx(HPARAMS["vrex_lambda"]),
    "GroupDRO": lambda network: GroupDRO(HPARAMS["groupdro_eta"]),
}


@pytest.fixture
def algorithms(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(CHECKOUT)
    pytest.importorskip("backpack", reason="backpack-for-pytorch is not installed")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # in which DomainBed builds its networks
    yield importlib.import_module("domainbed.algorithms")
    torch.set_default_dtype(dtype)
    for name in [name for name in sys.modules if name.startswith("domainbed")]:
        del sys.modules[name]


def domains(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(12, 5, generator=generator) * (1 + 0.3 * i), torch.randint(0, 3, (12,), generator=generator))
        for i in range(4)
    ]


@pytest.mark.parametrize(("name", "start"), [("Fishr", 0), ("Fishr", 7), ("VREx", 0), ("GroupDRO", 0)])
def test_is_domainbeds_class_over_twenty_updates(
    name: str, start: int, algorithms: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(HPARAMS, "penalty_anneal_iters", start)
    # BackPACK's hooks are on the inputs of a layer, to which backward(inputs=parameters) does not go in newer torch.
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, *args, inputs=None, **named: backward(self, *args, **named)
    )
    torch.manual_seed(0)
    theirs = getattr(algorithms, name)((5,), 3, 4, HPARAMS)
    network: nn.Module = copy.deepcopy(theirs.network)
    theirs._init_optimizer = lambda: None  # theirs is made anew when the penalty begins
    optimizer = GradMatch(torch.optim.Adam(network.parameters(), lr=0.01), METHODS[name](network))
    if name == "VREx":  # makes its optimizer anew in the update whose number this is
        monkeypatch.setattr(torch.optim, "Adam", lambda *_, **__: theirs.optimizer)
    for number in range(20):
        theirs.update(domains(number))
        optimizer.meta_step(lambda batch: F.cross_entropy(network(batch[0]), batch[1]), domains(number))
        for ours, p in zip(network.parameters(), theirs.network.parameters(), strict=True):
            torch.testing.assert_close(ours, p, rtol=1e-9, atol=1e-9)
