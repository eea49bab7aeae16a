"""
CORAL and Mixup beside the library's methods
============================================

:func:`torch_gradmatch.leave_one_domain_out` takes any training: a function that is given the model, the training
samples with a budget, and the settings. Here are CORAL (Sun and Saenko, *Deep CORAL*, ECCV Workshops 2016, arXiv
1607.01719) and Mixup (Zhang et al., ICLR 2018, arXiv 1710.09412).
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from torch_gradmatch import Choice, LogUniform, Recipe, leave_one_domain_out

torch.manual_seed(0)

# %%
# CORAL: the features of every two domains should have the same mean and covariance.


def coral(model, training, settings):
    """Train with a penalty on differences of the features' means and covariances."""
    optimizer = training.optimizer(model, settings)
    for batches in training.by_domain(settings["batch_size"]):  # the domain's label -> its batch
        loss, moments = 0.0, []
        for x, y in batches.values():
            features = model[:-1](x)
            loss = loss + cross_entropy(model[-1](features), y) / len(batches)
            moments.append(torch.cat([features.mean(0, keepdim=True), features.T.cov()]))
        spread = torch.stack(moments).var(0).mean()
        optimizer.zero_grad()
        (loss + settings["penalty"] * spread).backward()
        optimizer.step()


# %%
# Mixup: convex combinations of two samples, and of their losses.


def mixup(model, training, settings):
    """Train on mixtures of samples of all domains."""
    optimizer = training.optimizer(model, settings)
    mixing = torch.distributions.Beta(settings["alpha"], settings["alpha"])
    for x, y in training.pooled(settings["batch_size"]):
        share, other = mixing.sample(), torch.randperm(len(y))
        outputs = model(share * x + (1 - share) * x[other])
        loss = share * cross_entropy(outputs, y) + (1 - share) * cross_entropy(outputs, y[other])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# %%
# Five sites, which scale and shift their measurements each in its own way.

site = torch.arange(5).repeat_interleave(80)
truth = torch.randn(400, 6)
labels = (truth[:, :3].sum(1) > 0).long()
scale, shift = torch.rand(5, 6) + 0.5, 0.5 * torch.randn(5, 6)
dataset = TensorDataset(truth * scale[site] + shift[site] + 0.5 * torch.randn(400, 6), labels)

methods = {
    "ERM": "ERM",
    "CORAL": Recipe(train=coral, search={"penalty": LogUniform(0.01, 10, 1)}),
    "Mixup": Recipe(train=mixup, search={"alpha": Choice((0.2, 0.1, 0.4))}),
    "Fish": "Fish",
}
found = leave_one_domain_out(
    lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)),
    dataset,
    [f"site {int(number)}" for number in site],
    lambda model, batch: cross_entropy(model(batch[0]), batch[1]),
    lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
    methods,
    seeds=3,
    draws=2,
    budget=6000,
    search={"lr": LogUniform(1e-3, 3e-2, 1e-2)},
    show=False,
)
print(found)

# %%

figure = found.plot()
plt.figure(figsize=(7, 2.6))
for position, row in enumerate(found.rows):
    scores = [score for of_domain in row.by_domain.values() for score in of_domain]
    plt.plot(scores, [position] * len(scores), "|", markersize=9)
plt.yticks(range(len(found.rows)), [row.name for row in found.rows])
plt.xlabel("accuracy on the site held out")
plt.tight_layout()
plt.show()
