"""What exact matching costs a small Transformer that is trained on four domains: ``python examples/compare.py``.

A sequence of 32 tokens is of class 1 if token 0 stands in it more often than token 1. In each domain another token goes
with the class as well, nine times in ten: the easy answer, which does not last. After some ordinary training the
methods are compared on one batch of each domain, what each costs and how near it comes to the exact one; see
:func:`torch_gradmatch.compare`.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import trange

from torch_gradmatch import Comparison, compare

DOMAINS, VOCABULARY, LENGTH = 4, 64, 32
LOG_EVERY = 5  # steps: each domain's loss in turn


class Classifier(nn.Module):
    """Two encoder layers over token embeddings, then the mean over the sequence."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Parameter(torch.randn(LENGTH, width) / 10)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classify sequences.

        Returns:
            Logits, shape (batch, 2), of tokens of shape (batch, length).
        """
        return self.head(self.encoder(self.tokens(tokens) + self.places).mean(dim=1))


def draw(domain: int, size: int) -> tuple[Tensor, Tensor]:
    """Draw sequences of one domain.

    Returns:
        Tokens, shape (size, length), and classes, shape (size,).
    """
    tokens = torch.randint(2 + DOMAINS, VOCABULARY, (size, LENGTH))
    counted = torch.rand(size, LENGTH) < 0.3
    tokens[counted] = torch.randint(2, (int(counted.sum()),))
    labels = ((tokens == 0).sum(1) > (tokens == 1).sum(1)).long()
    marked = torch.where(torch.rand(size) < 0.9, labels, 1 - labels).bool()
    tokens[marked, 0] = 2 + domain
    return tokens, labels


def main(arguments: list[str] | None = None) -> Comparison:
    """Train, then compare.

    Returns:
        What was found.
    """
    parser = argparse.ArgumentParser(description="Compare Fish with exact gradient matching on a small Transformer.")
    parser.add_argument("--steps", type=int, default=100, help="steps of ordinary training before")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    parser.add_argument("--batch-size", type=int, default=32, help="sequences of each domain")
    parser.add_argument("--log", type=Path, metavar="DIR", help="write each domain's loss there, for TensorBoard")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, criterion = Classifier(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    with nullcontext() if options.log is None else SummaryWriter(options.log) as board:
        for step in (bar := trange(options.steps, desc="train", leave=False, disable=None)):
            tokens, labels = draw(step % DOMAINS, options.batch_size)
            optimizer.zero_grad()
            loss = criterion(model(tokens), labels)
            loss.backward()
            optimizer.step()
            if step % LOG_EVERY == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
                if board is not None:
                    board.add_scalar(f"loss/{step % DOMAINS}", loss.item(), step)
    batches = [draw(domain, options.batch_size) for domain in range(DOMAINS)]
    return compare(model, lambda model, batch: criterion(model(batch[0]), batch[1]), batches, optimizer=optimizer)


if __name__ == "__main__":
    main()
