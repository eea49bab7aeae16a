"""Fish in Accelerate: ``python examples/with_accelerate.py``; ``--exact`` for exact matching, ``--resume`` to go on.

What changes in a loop is the line that builds the optimizer, and the loader: it is left out of what Accelerate
prepares, and torchdata's ``StatefulDataLoader`` is registered to be saved with the rest.

- Keep the ``GradMatch`` itself: the optimizer that ``prepare`` returns has no ``meta_step``, ``slow_weights``,
  ``rollback``, ``inner_step`` or ``last_meta_step``. Both step the same object.
- For ``gradient_accumulation_steps=k`` pass ``accumulate=k`` to the sampler: a step then has k batches of one domain.
- It runs under ``accelerate launch`` and torchrun as it is, by DDP or FSDP2: the sampler gives each process its part of
  every batch; ``BATCH_SIZE`` is that of all together. A prepared loader would have the processes draw different domains
  for one step, which ``check_loader`` refuses. ``split_batches`` is for the schedule, which Accelerate would otherwise
  step once for every process.
- In the middle of an inner loop the model holds the fast weights. Evaluate it, and save it as a model, in a ``with
  gradmatch.slow_weights()`` block; ``save_state``, to resume from, belongs outside, and under FSDP2, which saves by
  ``torch.distributed.checkpoint``, between two inner loops: ``--save-every`` is a multiple of the domains here.
- A step that fp16's GradScaler skips moves nothing and counts as an inner step. The schedule counts it, too.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from _spurious_data import BATCH_SIZE, DOMAINS, ERM_LR, FISH_LR, accuracy, make_data, make_model
from accelerate import Accelerator, PartialState
from accelerate.utils import DataLoaderConfiguration
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm

from torch_gradmatch import IDGM, DomainBatchSampler, Fish, GradMatch, check_loader, domain_batches, meta_batches

LOG_EVERY = 2 * DOMAINS  # steps: reading what a meta-iteration measured synchronizes


def train(method: str, options: argparse.Namespace, directory: Path) -> tuple[torch.nn.Module, list[int]]:
    """Train by ERM, Fish or the exact objective.

    Args:
        method: "ERM", "Fish" or "exact".
        options: The command line.
        directory: For the checkpoint, taken every ``options.save_every`` steps.

    Returns:
        The model, and the class sums of the batches it was trained on, by which a test knows them again.
    """
    log_with = None if options.log is None else "tensorboard"
    accelerator = Accelerator(
        mixed_precision=options.precision,
        cpu=options.cpu,
        log_with=log_with,
        project_dir=options.log,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    accelerator.init_trackers(method)
    data, domains, held_out = make_data()
    model = make_model(0)
    ranks = {"num_replicas": accelerator.num_processes, "rank": accelerator.process_index, "split": "batch"}
    sampler = DomainBatchSampler(domains, BATCH_SIZE, seed=0, **ranks)
    loader = StatefulDataLoader(data, batch_sampler=sampler, num_workers=options.workers, generator=torch.Generator())

    optimizer = torch.optim.AdamW(model.parameters(), lr=FISH_LR if method == "Fish" else ERM_LR)
    if method == "Fish":  # this is what changes
        fish = Fish(0.05, inner_steps=DOMAINS, inner_state="reset", model=model, track_alignment=True)
        optimizer = gradmatch = GradMatch(optimizer, fish)
    elif method == "exact":
        together = {"process_group": dist.group.WORLD, "parallel": "data"} if accelerator.num_processes > 1 else {}
        exact = IDGM(model, track_alignment=True, **together)
        optimizer = gradmatch = GradMatch(optimizer, exact)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100, gamma=0.9)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)  # without the loader

    accelerator.register_for_checkpointing(loader)
    batches = meta_batches(loader) if method == "exact" else loader
    if method != "ERM":
        check_loader(optimizer, batches, accelerator.gradient_accumulation_steps)
    if options.resume:
        accelerator.load_state(str(directory))

    # IDGM averages over the processes itself: it is given, and loss_fn calls, the module inside Accelerate's.
    called = accelerator.unwrap_model(model) if method == "exact" else model

    def loss_fn(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = (part.to(accelerator.device) for part in batch)
        return torch.nn.functional.cross_entropy(called(x), y)

    seen = []
    steps_in_epoch, taken = len(batches), scheduler.scheduler.last_epoch
    while taken < options.epochs * steps_in_epoch:
        hidden = None if accelerator.is_main_process else True  # None: unless there is a terminal
        name = f"{method} epoch {taken // steps_in_epoch}"
        served = domain_batches(loader) if method == "Fish" else batches
        for batch in (bar := tqdm(served, desc=name, leave=False, disable=hidden, total=steps_in_epoch)):
            if method == "Fish":  # so that what is logged has the domains' names
                gradmatch.domain, batch = batch
            if method == "exact":
                loss = gradmatch.meta_step(loss_fn, batch).losses.mean()  # a list, one batch of each domain
            else:
                optimizer.zero_grad()
                loss = loss_fn(batch)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
            scheduler.step()
            seen.append(int(sum(b[1].sum() for b in batch)) if method == "exact" else int(batch[1].sum()))
            taken = scheduler.scheduler.last_epoch
            if taken % LOG_EVERY == 0:
                measured = {"loss": loss.item()} | ({} if method == "ERM" else gradmatch.last_meta_step.scalars())
                accelerator.log(measured, step=taken)
                bar.set_postfix({name: measured[name] for name in ("loss", "cosine") if name in measured})
            if taken % options.eval_every == 0:
                with gradmatch.slow_weights() if method != "ERM" else nullcontext():
                    found = accuracy(model, held_out)
                if accelerator.is_main_process:
                    bar.write(f"{method:5} {taken:5} steps, accuracy {found:.3f}")
            if taken % options.save_every == 0:
                accelerator.save_state(str(directory))
            if taken == options.stop_at:
                finish(accelerator)
                return model, seen
    if method != "ERM":
        gradmatch.rollback()  # to the slow weights, if training stopped in the middle of an inner loop
    finish(accelerator)
    return model, seen


def finish(accelerator: Accelerator) -> None:
    """Close the logs. ``end_training`` would have the processes part, too, and the next method is still to come."""
    for tracker in accelerator.trackers:
        tracker.finish()


def make_parser() -> argparse.ArgumentParser:
    """Describe the command line.

    Returns:
        The parser.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--exact", action="store_true", help="train by exact gradient matching, too")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--directory", type=Path, default=Path("out/accelerate"), help="for checkpoints")
    parser.add_argument("--log", type=Path, metavar="DIR", help="write losses and agreement there, for TensorBoard")
    parser.add_argument("--save-every", type=int, default=12 * DOMAINS, help="steps between two checkpoints")
    parser.add_argument("--eval-every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--stop-at", type=int, help="stop after so many steps, the model as it is by then")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of each method")
    return parser


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train and print the accuracy on the held-out domain.

    Returns:
        The accuracy by method.
    """
    options = make_parser().parse_args(arguments)
    found = {}
    for method in ("ERM", "Fish", *(("exact",) if options.exact else ())):
        model, _ = train(method, options, options.directory / method)
        found[method] = accuracy(model, make_data()[2])
        PartialState().print(f"{method:5} accuracy on the held-out domain {found[method]:.3f}", flush=True)
    PartialState().destroy_process_group()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
