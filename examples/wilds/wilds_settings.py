"""The authors' settings for each WILDS data set, in one table; and ours for the methods that they did not run there.

From the configuration file and the data loaders of the authors' code, github.com/YugeTen/fish. Shi et al., *Gradient
Matching for Domain Generalization*, ICLR 2022, arXiv 2104.09937.
"""

# ruff: noqa: E501 - one line for each data set

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["OURS", "PAPER", "OurSettings", "PaperSettings"]


@dataclass(frozen=True)
class PaperSettings:
    """How the authors trained on one data set.

    Attributes:
        wilds_name: What the ``wilds`` package calls the data set.
        model: What is trained.
        optimizer: Inner optimizer, and that of ERM and of the warm start.
        lr: Its learning rate.
        batch_size: Samples of one domain in a batch.
        meta_lr: As in the authors' file.
        divided: Whether their code divides ``meta_lr`` by the number of inner steps. It does, on every data set.
        domains_per_step: S, the domains of a meta-iteration: its inner steps.
        warm_start: Iterations of ERM before Fish.
        epochs: Passes over the domains' batches, of Fish after the warm start or of ERM from the beginning.
        eval_every: Iterations between evaluations within an epoch; 0 for one at its end only.
        metric: The metric of ``wilds`` by which the best model is chosen on the split ``val``; higher is better.
        keep: ``"best"`` by that metric, or ``"last"``: on FMoW their code keeps the latest model.
        domain: What counts as a domain.
        fields: The metadata that tell a domain.
        overlapping: Whether a sample can be in several domains.
    """

    wilds_name: str
    model: str
    optimizer: str
    lr: float
    batch_size: int
    meta_lr: float
    divided: bool
    domains_per_step: int
    warm_start: int
    epochs: int
    eval_every: int
    metric: str
    keep: str
    domain: str
    fields: tuple[str, ...]
    overlapping: bool = False

    @property
    def epsilon(self) -> float:
        """The step of the interpolation, ``meta_lr`` of :class:`torch_gradmatch.Fish`."""
        return self.meta_lr / self.domains_per_step if self.divided else self.meta_lr


_IDENTITIES = ("male", "female", "LGBTQ", "christian", "muslim", "other_religions", "black", "white")

# fmt: off
# The inner optimizer's state is carried from one meta-iteration to the next on all six. "adam" is Adam with amsgrad,
# "sgd" has momentum 0.9; no weight decay. Images have 224 pixels, texts at most 512 (Amazon) or 300 tokens.
PAPER = {
    #                          wilds name       model                     optimizer  lr  batch  meta_lr  divided  S  warm start  epochs  evaluate every  metric                 keep    domain
    "fmow":     PaperSettings("fmow",          "densenet121",            "adam", 1e-4,   64,   0.01,    True,   5, 24_000,     12,     500, "acc_worst_region",    "last", "year x region",    ("region", "year")),
    "camelyon": PaperSettings("camelyon17",    "densenet121-scratch",    "sgd",  1e-4,   32,   0.01,    True,   3, 10_000,     20,       0, "acc_avg",             "best", "hospital",         ("hospital",)),
    "poverty":  PaperSettings("poverty",       "resnet18-multispectral", "adam", 1e-3,   64,   0.1,     True,   5,      0,    200,       0, "r_wg",                "best", "country",          ("country",)),
    "iwildcam": PaperSettings("iwildcam",      "resnet50",               "adam", 1e-4,   16,   0.01,    True,  10, 24_000,     18,     500, "F1-macro_all",        "best", "location",         ("location",)),
    "amazon":   PaperSettings("amazon",        "distilbert",             "adam", 2e-6,    8,   0.01,    True,   5, 31_000,      3,     500, "10th_percentile_acc", "best", "user",             ("user",)),
    "civil":    PaperSettings("civilcomments", "distilbert",             "adam", 1e-5,   16,   0.05,    True,   5, 20_000,      5,     500, "acc_wg",              "best", "identity x label", (*_IDENTITIES, "y"), True),
}
# fmt: on


@dataclass(frozen=True)
class OurSettings:
    """A beginning for the methods that the authors did not run on WILDS. Nobody has trained with these on real data.

    Attributes:
        gamma: Strength of SmoothFish.
        inner_lr: Step of SmoothFish's walk by plain SGD.
        strength: Of the exact objective: how long the matching term is at first, relative to the mean gradient.
        agreement: Its agreement: "variance" is bounded, the paper's inner product is not.
    """

    gamma: float = 1.0
    inner_lr: float = 0.01
    strength: float = 0.1
    agreement: str = "variance"


OURS = OurSettings()
