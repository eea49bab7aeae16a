"""
A method of your own
====================

A method that works out one direction from the domains' gradients is one small class. Everything else is there already:
the wrapped optimizer's step, names of domains, a state dict, and what is restored if anything raises.

The method here is PCGrad (Yu et al., *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020, algorithm 1), with
domains in the place of tasks: where two domains' gradients point against one another, the part of the one that does is
taken out before the mean.
"""

from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch_gradmatch.alignment import gradient_alignment

from torch_gradmatch import IDGM, GradMatch, MetaStep
from torch_gradmatch.methods.direction import Direction, DirectionMethod

torch.set_num_threads(1)


@dataclass
class PCGrad(DirectionMethod):
    """The settings. PCGrad has none; these three are what every method of the kind has."""

    model: Any = None
    process_group: Any = None
    parallel: str = "data"

    def direction(self, given):
        """Work out the direction at the present parameters."""
        losses, gradients = [], []
        for number in range(len(given.batches)):
            loss = given.loss(number)
            losses.append(loss.detach())
            gradients.append(parameters_to_vector(torch.autograd.grad(loss, given.parameters)))
        projected = []
        for i, gradient in enumerate(gradients):
            for j in torch.randperm(len(gradients)).tolist():
                product = gradient @ gradients[j]
                if j != i and product < 0:
                    gradient = gradient - product / gradients[j].square().sum() * gradients[j]
            projected.append(gradient)
        parts = torch.stack(projected).mean(0).split([p.numel() for p in given.parameters])
        losses = torch.stack(losses) / given.scale
        return Direction(
            gradient=[part.view_as(p) for p, part in zip(given.parameters, parts, strict=True)],
            objective=losses.mean(),
            report=MetaStep(losses),
        )


# %%
# It trains through the same call as the others. Four domains, a feature that lasts, and a shortcut for each domain. In
# the test domain the shortcuts are noise.


def draw(domain, samples, generator):
    """Draw samples of one domain, or of the test domain."""
    agreement = torch.full((5,), 0.5)
    agreement[0] = 0.75
    if domain is not None:
        agreement[1 + domain] = 0.9
    labels = torch.randint(2, (samples,), generator=generator)
    agrees = torch.rand(samples, 5, generator=generator) < agreement
    return torch.where(agrees, 1.0, -1.0) * (2 * labels - 1)[:, None], labels


generator = torch.Generator().manual_seed(0)
batches = {f"domain {domain}": draw(domain, 256, generator) for domain in range(4)}
features, labels = draw(None, 4000, generator)
criterion = nn.CrossEntropyLoss()

curves = {}
for name in ("ERM", "PCGrad"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 32), nn.GELU(), nn.Linear(32, 2))
    method = PCGrad() if name == "PCGrad" else IDGM(model, gamma=0.0)
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), method)

    def loss_fn(batch, model=model):
        """Return the loss of a batch."""
        return criterion(model(batch[0]), batch[1])

    curves[name] = []
    for step in range(150):
        optimizer.meta_step(loss_fn, batches)
        if step % 5 == 0:
            curves[name].append(float(gradient_alignment(model.parameters(), loss_fn, batches).cosine))
    accuracy = (model(features).argmax(1) == labels).double().mean().item()
    print(f"{name}: accuracy in the test domain {accuracy:.3f}")

# %%
# The agreement of the gradients along the way. On these data the two curves lie on one another, and both models end
# alike: to take out what conflicts does not make gradients agree. ``Fish``, ``SmoothFish`` and ``IDGM`` are for that.

figure, axes = plt.subplots(figsize=(6, 3.5))
for name, cosines in curves.items():
    axes.plot(range(0, 150, 5), cosines, label=name)
axes.axhline(0, color="0.6", linestyle=":")
axes.set(xlabel="meta-iteration", ylabel="mean cosine of gradients")
axes.legend()
figure.tight_layout()
plt.show()
