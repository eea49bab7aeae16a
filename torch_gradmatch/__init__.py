"""Inter-domain gradient matching for PyTorch: a wrapper around any ``torch.optim.Optimizer``.

Shi et al., *Gradient Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937.
"""

import sys

from torch_gradmatch.data.loaders import check_loader
from torch_gradmatch.data.meta_batches import domain_batches, meta_batches
from torch_gradmatch.data.sampler import DomainBatchSampler
from torch_gradmatch.data.streams import DomainLoader
from torch_gradmatch.evaluation.compare import Comparison, compare
from torch_gradmatch.evaluation.evidence import Evidence
from torch_gradmatch.evaluation.leave_one_out import leave_one_domain_out
from torch_gradmatch.evaluation.recipes import Choice, LogUniform, Recipe
from torch_gradmatch.gradients import agreement, alignment, functional
from torch_gradmatch.gradients.agreement import fish_gamma
from torch_gradmatch.methods.aggregate import Aggregate
from torch_gradmatch.methods.fish import Fish
from torch_gradmatch.methods.fishr import Fishr
from torch_gradmatch.methods.idgm import IDGM
from torch_gradmatch.methods.risks import ERM, GroupDRO, VREx
from torch_gradmatch.methods.smooth_fish import SmoothFish
from torch_gradmatch.optimizer import GradMatch, MetaStep
from torch_gradmatch.slow import ops
from torch_gradmatch.slow._native import NativeStatus, native_status
from torch_gradmatch.slow.average import Average

__all__ = [
    "ERM",
    "IDGM",
    "Aggregate",
    "Average",
    "Choice",
    "Comparison",
    "DomainBatchSampler",
    "DomainLoader",
    "Evidence",
    "Fish",
    "Fishr",
    "GradMatch",
    "GroupDRO",
    "LogUniform",
    "MetaStep",
    "NativeStatus",
    "Recipe",
    "SmoothFish",
    "VREx",
    "__version__",
    "agreement",
    "alignment",
    "check_loader",
    "compare",
    "domain_batches",
    "fish_gamma",
    "functional",
    "leave_one_domain_out",
    "meta_batches",
    "native_status",
    "ops",
]

__version__ = "0.1.0.dev0"

# `import torch_gradmatch.functional as F` works, whichever room the module lives in; os does the same for os.path.
for _module in (agreement, alignment, functional, ops):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module
