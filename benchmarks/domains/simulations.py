"""``python -m benchmarks.domains.simulations``: how often ``leave_one_domain_out`` says yes where the truth is known.

``hospitals``
    Six hospitals without any shift between them: patients of one population, several slides of each. There is nothing
    that a method could gain by matching domains. Patients are the groups.
``permuted``
    Sites with a shortcut of their own, whose labels are dealt out anew (``permuted=``): the control.
``shortcut``
    CdSprites in small, as features: a weak shape that goes with the class everywhere, and for every domain a strong
    colour. A domain's own colour goes with the class, and the other domains' colours go against it a little, so that
    all colours together pay in training and mislead in a domain that is new.

"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from torch_gradmatch import IDGM, Choice, Evidence, Recipe, leave_one_domain_out

__all__ = ["STUDIES", "hospitals", "main", "permuted", "shortcut"]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).double()


def perceptron(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 2))


def slides(
    seed: int, patients: int = 16, each: int = 5, features: int = 16
) -> tuple[TensorDataset, list[int], list[str]]:
    """Slides of patients of six hospitals, and the patient and hospital of each; a patient is ill or not."""
    generator = torch.Generator().manual_seed(seed)
    number = 6 * patients
    people = torch.randn(number, features, generator=generator)
    truth = people[:, :4].sum(1) + 1.5 * torch.randn(number, generator=generator) > 0
    x = people.repeat_interleave(each, 0) + 0.3 * torch.randn(number * each, features, generator=generator)
    patient = [i for i in range(number) for _ in range(each)]
    return TensorDataset(x, truth.long()[patient]), patient, [f"hospital {i // patients}" for i in patient]


BRIEF: dict[str, Any] = {"seeds": 5, "draws": 2, "budget": 4000, "evaluations": 5, "show": False}


def hospitals(seed: int) -> Evidence:
    """Study hospitals without a shift, with patients as groups."""
    dataset, patient, hospital = slides(seed)
    settings = BRIEF | {"draws": 1, "groups": patient}
    return leave_one_domain_out(lambda: perceptron(16), dataset, hospital, cross_entropy, accuracy, **settings)


def shifted(seed: int, domains: int = 6, each: int = 80) -> tuple[TensorDataset, list[str]]:
    """Sites that share four weak features, and have a strong one of their own each."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (domains * each,), generator=generator)
    sign = 2.0 * y - 1
    x = torch.randn(domains * each, 4 + domains, generator=generator)
    x[:, :4] += 0.4 * sign[:, None]
    site = torch.arange(domains).repeat_interleave(each)
    x[torch.arange(domains * each), 4 + site] += 2 * sign
    return TensorDataset(x, y), [f"site {int(i)}" for i in site]


def permuted(seed: int) -> Evidence:
    """Study sites whose labels were dealt out anew."""
    dataset, site = shifted(seed)
    methods, settings = ["ERM", "ERM, balanced", "Fish", "IDGM, head"], BRIEF | {"draws": 1, "permuted": 1 + seed}
    return leave_one_domain_out(lambda: perceptron(10), dataset, site, cross_entropy, accuracy, methods, **settings)


def coloured(seed: int, domains: int = 6, each: int = 200) -> tuple[TensorDataset, list[str]]:
    """A shape that lasts, and colours that go with the class in one domain each and against it in the others."""
    generator = torch.Generator().manual_seed(seed)
    number = domains * each
    y = torch.randint(2, (number,), generator=generator)
    sign = 2.0 * y[:, None] - 1
    site = torch.arange(domains).repeat_interleave(each)
    colours = torch.full((number, domains), -0.15)
    colours[torch.arange(number), site] = 1.0
    colours = 1.5 * sign * colours + 0.5 * torch.randn(number, domains, generator=generator)
    shape = 0.3 * sign + 0.3 * torch.randn(number, 4, generator=generator)
    return TensorDataset(torch.cat([shape, colours], 1), y), [f"colour {int(i)}" for i in site]


def shortcut(seed: int) -> Evidence:
    """Study coloured shapes at one learning rate, the same for all; at a higher one ordinary training gains, too."""
    dataset, site = coloured(seed)
    strong = Recipe(lambda model, _: IDGM(model, strength=30.0))
    methods = {"ERM": "ERM", "ERM, balanced": "ERM, balanced", "IDGM, strength 30": strong}
    settings = BRIEF | {"draws": 1, "budget": 20_000, "evaluations": 1, "optimizer": torch.optim.SGD}
    search = {"lr": Choice((0.1,)), "batch_size": Choice((128,))}
    return leave_one_domain_out(
        lambda: nn.Linear(10, 2), dataset, site, cross_entropy, accuracy, methods, search=search, **settings
    )


STUDIES: dict[str, Callable[[int], Evidence]] = {"hospitals": hospitals, "permuted": permuted, "shortcut": shortcut}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", help=f"which of {', '.join(STUDIES)}; all if none is named")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/report/simulations.json"))
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    for name in options.studies or STUDIES:
        start, answers = time.perf_counter(), []
        for seed in range(options.seeds):
            evidence = STUDIES[name](seed)
            answers.append({"best": evidence.best, "answer": evidence.answer})
            print(f"{name} {seed}: {evidence.best} | {evidence.answer}", file=sys.stderr, flush=True)
        yes = sum("Yes. Use" in answer["answer"] for answer in answers)
        found[name] = {"yes": yes, "of": options.seeds, "seconds": time.perf_counter() - start, "answers": answers}
        print(f"{name}: {yes} yes of {options.seeds}, {found[name]['seconds']:.0f} s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
