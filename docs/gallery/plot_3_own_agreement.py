"""
An agreement of your own
========================

``IDGM(agreement=...)`` takes a function of the list of gradients. It is written with torch's operations, returns a
scalar, and is to be *raised*: the objective is the mean loss minus gamma times the agreement.

Here the agreement is the least cosine of any two domains' gradients, so that one domain that pulls against the others
is not outvoted.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize
from torch_gradmatch.alignment import gradient_alignment

from torch_gradmatch import IDGM, GradMatch

torch.set_num_threads(1)
torch.manual_seed(0)


def least_cosine(gradients):
    """Return the least cosine of any two gradients; each is a dictionary by the parameters' names, as the model's."""
    flat = torch.stack([torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients])
    unit = normalize(flat, dim=1)
    first, second = torch.triu_indices(len(flat), len(flat), offset=1)
    return (unit @ unit.T)[first, second].amin()


# %%
# Three domains: the first feature lasts, and each domain has another shortcut.


def draw(domain, samples):
    """Draw samples of one domain."""
    agreement = torch.full((4,), 0.5)
    agreement[0], agreement[1 + domain] = 0.75, 0.9
    labels = torch.randint(2, (samples, 1)).float()
    agrees = torch.rand(samples, 4) < agreement
    return torch.where(agrees, 1.0, -1.0) * (2 * labels - 1), labels


batches = {f"domain {domain}": draw(domain, 512) for domain in range(3)}


def train(agreement, gamma):
    """Train a small network, and return the least cosine after every tenth meta-iteration."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 1))
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=1e-2), IDGM(model, gamma, agreement))

    def loss_fn(batch):
        return binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    found = []
    for step in range(200):
        report = optimizer.meta_step(loss_fn, batches)
        if step % 10 == 0:
            measured = gradient_alignment(model.parameters(), loss_fn, batches.values(), pairs=True)
            found.append(measured.cosines[~torch.eye(3, dtype=torch.bool)].min().item())
    print(f"gamma {gamma}, loss at the end: {report.losses.mean():.3f}, least cosine: {found[-1]:+.3f}")
    return found


# %%
# With ``gamma=0`` it is ordinary training.

figure, axes = plt.subplots(figsize=(6, 3.5))
for label, gamma in {"without": 0.0, "least cosine, gamma 0.1": 0.1}.items():
    axes.plot(range(0, 200, 10), train(least_cosine, gamma), label=label)
axes.axhline(0, color="0.6", linestyle=":")
axes.set(xlabel="meta-iteration", ylabel="least cosine of two domains' gradients")
axes.legend()
figure.tight_layout()
plt.show()
