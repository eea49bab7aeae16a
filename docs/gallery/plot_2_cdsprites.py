"""
CdSprites, in small
===================

Fifteen training domains of squares and ellipses. In each of them every shape has a colour of its own, so colour and
shape explain the label equally well. In the test set the colours are new and say nothing. The data and the network are
those of ``examples/cdsprites.py``, with fewer and smaller images. Size and learning rates were found by trying on these
very images, one seed: this shows how it looks, and is no evidence.
"""

import sys
from itertools import chain, repeat
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.utils.data import DataLoader

from torch_gradmatch import IDGM, DomainBatchSampler, GradMatch, SmoothFish, meta_batches

try:
    EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
except NameError:  # in a notebook, which is started in the checkout
    EXAMPLES = Path("examples").resolve()
sys.path.insert(0, str(EXAMPLES))

from _cdsprites_data import DrawnSprites, SpriteDataset, make_cdsprites

torch.set_num_threads(1)
torch.set_flush_denormal(True)
DOMAINS, SIZE, ITERATIONS = 15, 24, 150

data = make_cdsprites(DrawnSprites(), domains=DOMAINS, images_per_domain=800, eval_images=600, size=SIZE, seed=0)
training, _, unseen = (SpriteDataset(split, torch.device("cpu")) for split in data)
domains = data.train.domains.tolist()

# %%
# Three images of each shape, in training and in the test set.

figure, both = plt.subplots(2, 6, figsize=(7, 2.6))
for row, (title, dataset) in zip(both, {"training": training, "test": unseen}.items(), strict=True):
    step = len(dataset) // 6 // 2 * 2 + 1  # the labels alternate
    images, labels = dataset.__getitems__([number * step for number in range(6)])
    for axes, image, label in zip(row, images, labels, strict=True):
        axes.imshow(image.movedim(0, -1).numpy())
        axes.set_title(f"{title}: {('square', 'ellipse')[label]}", fontsize="x-small")
        axes.axis("off")

# %%
# Both methods see the same batches, one of each domain in a meta-iteration. ERM is ``IDGM`` with ``gamma=0``, a step
# along the mean gradient. ``SmoothFish`` with ``gamma=1`` costs as many gradients: 15 in a meta-iteration.


def make_model():
    """Build the network."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(64 * 3 * 3, 2),
    )


@torch.no_grad()
def accuracy(model, dataset):
    """Return the fraction of images that a model classifies rightly."""
    images, labels = dataset.__getitems__(range(len(dataset)))
    return (model(images).argmax(1) == labels).double().mean().item()


def train(model, method, lr):
    """Train a model, and return its accuracy on unseen colours after every tenth meta-iteration."""
    optimizer = GradMatch(torch.optim.Adam(model.parameters(), lr=lr), method)
    loader = DataLoader(
        training, batch_sampler=DomainBatchSampler(domains, batch_size=32), collate_fn=lambda batch: batch
    )
    epochs = chain.from_iterable(repeat(meta_batches(loader)))  # one after the other
    found = [accuracy(model, unseen)]
    for iteration, batches in zip(range(1, ITERATIONS + 1), epochs, strict=False):
        optimizer.meta_step(lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1]), batches)
        if iteration % 10 == 0:
            found.append(accuracy(model, unseen))
    return found


curves = {}
for name, lr in {"ERM": 1e-3, "SmoothFish": 5e-3}.items():
    model = make_model()
    method = IDGM(model, gamma=0.0) if name == "ERM" else SmoothFish(gamma=1.0, inner_lr=0.4)
    curves[name] = train(model, method, lr)
    print(f"{name}: accuracy {curves[name][-1]:.3f} on unseen colours")

# %%
# The full comparison, with Fish, the exact objective and more seeds, is ``make demo``.

figure, axes = plt.subplots(figsize=(6, 3.5))
for name, found in curves.items():
    axes.plot(range(0, ITERATIONS + 1, 10), found, label=name)
axes.axhline(0.5, color="0.6", linestyle=":")
axes.set(xlabel="meta-iteration of 15 gradients", ylabel="accuracy on unseen colours")
axes.legend()
figure.tight_layout()
plt.show()
