"""Inter-domain gradient matching for PyTorch: a drop-in wrapper around any ``torch.optim.Optimizer``.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937.
"""

from torch_gradmatch._native import NativeStatus, native_status
from torch_gradmatch.fish import Fish
from torch_gradmatch.optimizer import GradMatch, MetaStep
from torch_gradmatch.sampling import DomainBatchSampler, meta_batches

__all__ = [
    "DomainBatchSampler",
    "Fish",
    "GradMatch",
    "MetaStep",
    "NativeStatus",
    "meta_batches",
    "native_status",
]
