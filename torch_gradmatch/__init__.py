"""Inter-domain gradient matching for PyTorch: a drop-in wrapper around any ``torch.optim.Optimizer``.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937.
"""

from torch_gradmatch import agreement, functional
from torch_gradmatch._native import NativeStatus, native_status
from torch_gradmatch.agreement import fish_gamma
from torch_gradmatch.comparison import Comparison, compare
from torch_gradmatch.fish import Fish
from torch_gradmatch.idgm import IDGM
from torch_gradmatch.loaders import ResumableLoader, check_loader
from torch_gradmatch.optimizer import GradMatch, MetaStep
from torch_gradmatch.sampling import DomainBatchSampler, meta_batches
from torch_gradmatch.smooth_fish import SmoothFish

__all__ = [
    "IDGM",
    "Comparison",
    "DomainBatchSampler",
    "Fish",
    "GradMatch",
    "MetaStep",
    "NativeStatus",
    "ResumableLoader",
    "SmoothFish",
    "agreement",
    "check_loader",
    "compare",
    "fish_gamma",
    "functional",
    "meta_batches",
    "native_status",
]
