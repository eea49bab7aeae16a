"""Fish on domains of 10, 1,000 and 100,000 samples: ``python examples/unequal_domains.py --checkpoint out/unequal.pt``.

The label is whether two features have the same sign, which holds in nine samples of ten of every domain. In each
training domain another feature, its clue, has the label's sign in 95 % of the samples; elsewhere it is noise. So one
clue is what pays on 99 % of the data, and none says anything about the fourth domain, which is only evaluated on.

One sees a progress bar with the loss and the cosine of the domains' gradients, and at the end the accuracy in every
domain. In a cycle each domain serves every third batch to the end: in each epoch the small one goes round 240 times (it
is learnt by heart), the large one shows a sixth of its samples. With ``exhausted="stop"`` an epoch is three batches.

What helps in the unseen domain here is that domains take turns: its accuracy is 0.75 (mean of ten seeds) by Fish, and
just as much by the two optimizers alone on the same batches, but 0.52 where they train on batches of all samples alike.
Five epochs of ``exhausted="stop"`` give 0.53, and 1,200 of them, which are the same number of batches, 0.75.

Kill it whenever you like: the same command goes on from the last checkpoint, and ends bit for bit where it would have
ended. ``--logs DIRECTORY`` writes scalars for TensorBoard; a meta-iteration that was resumed in the middle has no
cosines there. ``--meta-step`` hands over one batch of each domain at a
time instead of stepping in a plain loop.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from torch_gradmatch import DomainBatchSampler, Fish, GradMatch, meta_batches

SIZES = {"small": 10, "medium": 1_000, "large": 100_000, "unseen": 0}  # training samples
BATCH_SIZE = 64
LEARNING_RATES = [0.02, 0.003]  # of Muon and of AdamW


def draw(domain: str, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw samples of one domain.

    Returns:
        Features, shape (size, 5), and labels, shape (size,).
    """
    labels = torch.randint(2, (size,), generator=generator)
    x = torch.randn(size, 5, generator=generator)

    def signs(agreement: float) -> Tensor:
        agrees = torch.rand(size, generator=generator) < agreement
        return torch.where(agrees, 1.0, -1.0) * (2 * labels - 1)

    x[:, 1] = x[:, 1].abs() * x[:, 0].sign() * signs(0.9)
    if domain != "unseen":
        clue = 2 + list(SIZES).index(domain)
        x[:, clue] = x[:, clue].abs() * signs(0.95)
    return x, labels


def make_model() -> tuple[nn.Module, list[nn.Parameter], list[nn.Parameter]]:
    """Make a network.

    Returns:
        It, its hidden matrices, which are for Muon, and the rest of its parameters.
    """
    hidden = [layer for _ in range(2) for layer in (nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1))]
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), *hidden, nn.Linear(64, 2))
    matrices = [layer.weight for layer in hidden if isinstance(layer, nn.Linear)]
    return model, matrices, [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, or go on training, and evaluate.

    Returns:
        The accuracy by domain, on samples that were not trained on.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batches-per-epoch", type=int, default=720)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, if it is there, and to write")
    parser.add_argument("--save-every", type=int, default=100, help="steps between two checkpoints")
    parser.add_argument("--logs", type=Path, help="directory for TensorBoard")
    parser.add_argument("--meta-step", action="store_true", help="hand over one batch of each domain at a time")
    options = parser.parse_args(arguments)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(options.seed)
    drawn = {name: draw(name, size, generator) for name, size in SIZES.items()}
    held_out = {name: draw(name, 10_000, generator) for name in SIZES}
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*drawn.values(), strict=True)))
    labels = [name for name, size in SIZES.items() for _ in range(size)]
    sampler = DomainBatchSampler(
        labels,
        BATCH_SIZE,
        seed=options.seed,
        exhausted="cycle",
        batches_per_epoch=options.batches_per_epoch,
    )
    # A generator of its own, or the loader draws from dropout's whenever it is iterated: also once more when resumed.
    loader = DataLoader(data, batch_sampler=sampler, generator=torch.Generator())

    torch.manual_seed(options.seed)
    model, matrices, rest = make_model()
    model.to(device)
    domains = sampler.domains_per_step
    optimizer = GradMatch(
        [torch.optim.Muon(matrices, lr=LEARNING_RATES[0]), torch.optim.AdamW(rest, lr=LEARNING_RATES[1])],
        Fish(meta_lr=0.5, inner_steps=domains, model=model, track_alignment="pairs"),
    )
    total_steps = sampler.total_batches(options.epochs) // (domains if options.meta_step else 1)
    # Muon calls it momentum and AdamW betas: OneCycleLR can cycle neither, since not all groups have it.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATES, total_steps=total_steps, cycle_momentum=False
    )
    stateful = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler}

    step, losses = 0, []  # of the inner loop in progress
    if options.checkpoint and options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        for name, one in stateful.items():
            one.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"][0])
        torch.cuda.set_rng_state_all(saved["random"][1:])
        step, losses = saved["step"], saved["losses"]
    # Scalars of steps after the checkpoint are logged again: TensorBoard is to forget those of before.
    writer = SummaryWriter(options.logs, purge_step=step + 1) if options.logs else None

    def loss_fn(batch: list[Tensor]) -> Tensor:
        x, y = (part.to(device) for part in batch)
        with torch.autocast(device.type, torch.bfloat16):
            return nn.functional.cross_entropy(model(x), y)

    bar = tqdm(total=total_steps, initial=step)
    while step < total_steps:
        for batch in meta_batches(loader, domains) if options.meta_step else loader:
            if options.meta_step:
                optimizer.meta_step(loss_fn, batch)
            else:
                optimizer.zero_grad()
                loss = loss_fn(batch)
                loss.backward()
                optimizer.step()  # every third one also interpolates
                losses.append(loss.detach())
            scheduler.step()
            step += 1
            bar.update()
            if optimizer.inner_step == 0:  # between two inner loops
                scalars = optimizer.last_meta_step.scalars("train/")
                if not options.meta_step:  # a plain loop keeps its losses by itself
                    scalars["train/loss"] = float(torch.stack(losses).mean())
                    losses = []
                shown = {name: scalars[f"train/{name}"] for name in ("loss", "cosine") if f"train/{name}" in scalars}
                bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
                for name, value in scalars.items() if writer else ():
                    writer.add_scalar(name, value, step)
            if options.checkpoint and (step % options.save_every == 0 or step == total_steps):
                if writer:
                    writer.flush()  # what is not written when the process dies is not logged again
                saved = {name: one.state_dict() for name, one in stateful.items()}
                saved |= {"random": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]}
                saved |= {"step": step, "losses": losses}
                options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
                torch.save(saved, unfinished := options.checkpoint.with_suffix(".unfinished"))
                os.replace(unfinished, options.checkpoint)  # at once: there is always a whole checkpoint
    bar.close()
    if writer:
        writer.close()

    model.eval()
    with torch.no_grad():
        found = {
            name: float((model(x.to(device)).argmax(1).cpu() == y).float().mean()) for name, (x, y) in held_out.items()
        }
    for name, accuracy in found.items():
        print(f"{name:7} {SIZES[name]:7,} training samples, accuracy {accuracy:.3f}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small more would only wait for one another
    main()
