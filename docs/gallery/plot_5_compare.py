"""
What exact matching costs a Transformer
=======================================

:func:`torch_gradmatch.compare` takes your model, your loss and one batch of each domain, and says what each method
costs there and how near it comes to the exact direction. Everything it is given stays as it was, bit for bit.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from torch_gradmatch import SmoothFish, compare

torch.set_num_threads(1)
torch.manual_seed(0)
DOMAINS, VOCABULARY, LENGTH, WIDTH = 3, 32, 12, 32


class Classifier(nn.Module):
    """One encoder layer over token embeddings, then the mean over the sequence."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, activation="gelu", batch_first=True)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, tokens):
        """Return logits, shape (batch, 2)."""
        return self.head(self.encoder(self.tokens(tokens)).mean(dim=1))


# %%
# A sequence is of class 1 if it holds more of token 0 than of token 1. In each domain another token goes with the
# class, nine times in ten.


def draw(domain, samples):
    """Draw sequences of one domain and their classes."""
    tokens = torch.randint(2 + DOMAINS, VOCABULARY, (samples, LENGTH))
    counted = torch.rand(samples, LENGTH) < 0.3
    tokens[counted] = torch.randint(2, (int(counted.sum()),))
    labels = ((tokens == 0).sum(1) > (tokens == 1).sum(1)).long()
    marked = torch.where(torch.rand(samples) < 0.9, labels, 1 - labels).bool()
    tokens[marked, 0] = 2 + domain
    return tokens, labels


model, criterion = Classifier(), nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def loss_fn(model, batch):
    """Return the loss of a batch."""
    return criterion(model(batch[0]), batch[1])


for step in range(60):  # some ordinary training: at the initial weights there is little to compare
    optimizer.zero_grad()
    loss_fn(model, draw(step % DOMAINS, 32)).backward()
    optimizer.step()

batches = [draw(domain, 16) for domain in range(DOMAINS)]
found = compare(model, loss_fn, batches, optimizer=optimizer, rounds=2, orders=4)

# %%
# The rows are numbers, too. A method with other settings is compared by name: here SmoothFish at three learning rates
# of its walk. The smaller the rate, the nearer it is to exact, until rounding counts.

rates = (0.001, 0.01, 0.1)
methods = {f"inner_lr {rate:g}": SmoothFish(1e-3, rate, model=model, symmetric=True) for rate in rates}
walks = compare(model, loss_fn, batches, methods, optimizer=optimizer, rounds=1, orders=2, show=False)
cosines = [walks[name].fidelity.cosine for name in methods]
figure, axes = plt.subplots(figsize=(6, 3.5))
axes.semilogx(rates, [1 - cosine for cosine in cosines], "o-")
axes.set(xlabel="inner_lr", ylabel="1 - cosine with the exact term", yscale="log")
figure.tight_layout()
plt.show()
