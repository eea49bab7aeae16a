"""What frameworks that write the training loop need beside the optimizer and the loader.

:class:`~torch_gradmatch.integrations.huggingface.DomainTrainer` is for the ``Trainer`` of transformers,
:class:`~torch_gradmatch.integrations.lightning.GradMatchCallback` for Lightning; Accelerate needs nothing. A framework
is imported with its module only, and ``import torch_gradmatch`` imports neither.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_gradmatch.integrations.huggingface import DomainTrainer
    from torch_gradmatch.integrations.lightning import GradMatchCallback
    from torch_gradmatch.optimizer import GradMatch

__all__ = ["DomainTrainer", "GradMatchCallback"]

_MODULES = {"DomainTrainer": "huggingface", "GradMatchCallback": "lightning"}
WEIGHTS = ("slow", "averaged")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def needs(packages: str, module: str, error: ImportError) -> ImportError:
    """Return an error that says what to install."""
    return ImportError(f"{module} needs {packages.split()[0]} ({error}): pip install {packages}")


def evaluation_weights(optimizer: GradMatch[Any] | None, weights: str) -> AbstractContextManager[None]:
    """Let the model hold the weights to evaluate: the average once it has begun, if asked for, else the slow weights.

    Args:
        optimizer: None for plain training, whose weights are as they are.
        weights: ``"slow"`` or ``"averaged"``.

    Returns:
        A context manager.
    """
    if optimizer is None:
        return nullcontext()
    begun = optimizer._average is None or optimizer._average.count > 0  # without an average it is an error in words
    return optimizer.averaged_weights() if weights == "averaged" and begun else optimizer.slow_weights()
