"""The networks that the authors trained on WILDS, with pretrained weights where they had them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from wilds_data import MissingDataError, Tokens
from wilds_settings import PaperSettings

__all__ = ["Tokenizer", "make_model", "make_tokenizer"]

BERT = "distilbert-base-uncased"
TORCHVISION = {
    "resnet50": (models.resnet50, models.ResNet50_Weights.IMAGENET1K_V1),
    "densenet121": (models.densenet121, models.DenseNet121_Weights.IMAGENET1K_V1),
}


def make_model(settings: PaperSettings, num_outputs: int, weights: str) -> nn.Module:
    """Build the network of a data set.

    Camelyon17 and PovertyMap begin with random weights, as in the authors' code, whatever ``weights`` is.

    Args:
        settings: Those of the data set.
        num_outputs: Number of classes, or 1 for a real number.
        weights: "pretrained" (on ImageNet, or as a language model), "none", or a path: a file of torchvision's
            weights, or a folder in Hugging Face's format.

    Returns:
        The network, on the CPU.

    Raises:
        MissingDataError: If the weights are not on this machine and cannot be downloaded.
    """
    if settings.model == "resnet18-multispectral":
        model = models.resnet18(num_classes=num_outputs)
        model.conv1 = nn.Conv2d(8, 64, kernel_size=7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        return model
    if settings.model == "densenet121-scratch":
        return models.densenet121(num_classes=num_outputs)
    if settings.model == "distilbert":
        return _DistilBert(num_outputs, weights)
    build, pretrained = TORCHVISION[settings.model]
    if weights == "none":
        return build(num_classes=num_outputs)
    model = build()
    try:
        if weights == "pretrained":
            state = pretrained.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except OSError as error:  # urllib's errors are such, too
        raise MissingDataError(
            f"the weights of {settings.model} are not here and cannot be downloaded ({error}).\n"
            "On a machine with access to the network run\n"
            f'    python -c "from torchvision.models import {type(pretrained).__name__} as w; '
            f'w.IMAGENET1K_V1.get_state_dict()"\n'
            f"and pass the file {Path(pretrained.url).name} from its ~/.cache/torch/hub/checkpoints as --weights PATH, "
            "or begin with random weights: --weights none"
        ) from None
    model.load_state_dict(_with_present_names(state))
    # The last layer is the data set's own.
    if settings.model == "resnet50":
        model.fc = nn.Linear(model.fc.in_features, num_outputs)
    else:
        model.classifier = nn.Linear(model.classifier.in_features, num_outputs)
    return model


def _with_present_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # The file of DenseNet-121 has names of before torch 1.0: "norm.1.weight" for "norm1.weight".
    return {
        name.replace(".norm.", ".norm").replace(".conv.", ".conv") if name.startswith("features.dense") else name: value
        for name, value in state.items()
    }


class _DistilBert(nn.Module):
    """DistilBERT with a classifier, from tokens to logits."""

    def __init__(self, num_outputs: int, weights: str) -> None:
        super().__init__()
        from transformers import DistilBertConfig, DistilBertForSequenceClassification

        if weights == "none":
            self.model = DistilBertForSequenceClassification(DistilBertConfig(num_labels=num_outputs))
        else:
            source = BERT if weights == "pretrained" else weights
            # A folder may hold a classifier of other classes, which is left out.
            settings = {"num_labels": num_outputs, "ignore_mismatched_sizes": True}
            self.model = _from_hub(DistilBertForSequenceClassification, source, **settings)

    def forward(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.model(**tokens).logits


class Tokenizer:
    """Turns texts into tensors of tokens. Can be sent to the workers of a ``DataLoader``.

    Args:
        tokenizer: From ``transformers``.
        max_tokens: Longer texts are cut.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens

    def __call__(self, texts: list[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, shape (texts, tokens of the longest)."""
        found = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}


def make_tokenizer(
    settings: PaperSettings, weights: str, max_tokens: int, texts: Iterable[str], folder: Path
) -> Tokens | None:
    """Load the tokenizer of the weights, or learn one where there are none.

    Args:
        settings: Those of the data set.
        weights: As for :func:`make_model`.
        max_tokens: Longer texts are cut.
        texts: The training texts, from which to learn if ``weights`` is "none".
        folder: Where a tokenizer that was learned is kept for a resumed run.

    Returns:
        The tokenizer; None if the inputs are images.

    Raises:
        MissingDataError: If it is not on this machine and cannot be downloaded.
    """
    if settings.model != "distilbert":
        return None
    from transformers import DistilBertTokenizerFast

    if weights != "none":
        return Tokenizer(_from_hub(DistilBertTokenizerFast, BERT if weights == "pretrained" else weights), max_tokens)
    if not (folder / "tokenizer.json").exists():
        template = DistilBertTokenizerFast(vocab={token: i for i, token in enumerate(SPECIAL_TOKENS)})
        learned = template.train_new_from_iterator(texts, vocab_size=30_522, show_progress=False)
        learned.save_pretrained(folder)
    return Tokenizer(DistilBertTokenizerFast.from_pretrained(folder), max_tokens)


SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _from_hub(kind: Any, source: str, **settings: Any) -> Any:
    if source != BERT and not Path(source).is_dir():
        raise MissingDataError(f"--weights {source} is no folder: it should hold a DistilBERT in Hugging Face's format")
    try:
        return kind.from_pretrained(source, **settings)
    except OSError as error:
        raise MissingDataError(
            f"{source} is not here and cannot be downloaded ({str(error).splitlines()[0]}).\n"
            "On a machine with access to the network run\n"
            f"    hf download {BERT} --local-dir {BERT}\n"
            "and pass that folder as --weights PATH, or begin with random weights: --weights none"
        ) from None
