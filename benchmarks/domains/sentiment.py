"""Sentiment of short texts by genre: the human scores behind VADER (Hutto and Gilbert, ICWSM 2014).

The texts are those of ``vaderSentiment``'s source package; a small language model reads them (``all-MiniLM-L6-v2``,
Wang et al., arXiv 2002.10957), whose features of a sentence are frozen.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.domains.source import Loaded, Source, content_of, find

__all__ = ["SOURCE", "read"]

COMMAND = "make domains-data"
TEXTS = "vaderSentiment-3.3.2.tar.gz"
INSIDE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MODEL = "all_minilm_l6_v2/model.zip"
CACHE = "sentiment-half.pt"
GENRES = {
    "tweets": "tweet",
    "amazonReviewSnippets": "product",
    "nytEditorialSnippets": "news",
    "movieReviewSnippets": "film",
}


def read(path: Path) -> list[tuple[str, str, float, str]]:
    """Read the texts.

    Args:
        path: Of the source package.

    Returns:
        Genre, group, score from -4 to 4, and text. The group is a review or an article of which there are several
        sentences.

    Raises:
        ValueError: If it is another file, or damaged.
    """
    found = []
    try:
        with tarfile.open(path) as outer, tarfile.open(fileobj=io.BytesIO(content_of(outer, INSIDE))) as inner:
            for file, genre in GENRES.items():
                text = content_of(inner, f"hutto_ICWSM_2014/{file}_GroundTruth.txt").decode("utf-8", "replace")
                for line in text.splitlines():
                    number, score, words = line.split("\t")
                    found.append((genre, f"{genre} {number.partition('_')[0]}", float(score), words))
    except (KeyError, ValueError, EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is not the source of vaderSentiment 3.3.2: {error}") from error
    return found


@torch.no_grad()
def embedded(root: Path, texts: list[str]) -> Tensor:
    """Return features of sentences: the mean of the last layer over words, of length 1.

    Args:
        root: The folder of the files.
        texts: The sentences; what comes after 128 pieces of words is cut off.

    Returns:
        Shape (samples, 384), computed once. In half precision, rounded from double, they are the same on every CPU:
        runs know their data by a hash.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = root / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        with zipfile.ZipFile(find(root, (MODEL,), COMMAND)) as file:
            file.extractall(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).double().eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that a batch has texts of one length
    features = torch.empty(len(texts), 384, dtype=torch.float16)
    for first in range(0, len(order), 64):
        chosen = order[first : first + 64]
        inputs: Any = tokenizer(
            [texts[i] for i in chosen], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        mask = inputs["attention_mask"][:, :, None]
        words = model(**inputs).last_hidden_state
        features[chosen] = functional.normalize((words * mask).sum(1) / mask.sum(1), dim=1).half()
    return features


def load(root: Path) -> Loaded:
    """Return the texts as the language model reads them, with the score that people gave them."""
    rows = read(find(root, (TEXTS,), COMMAND))
    path = root / CACHE
    if not path.is_file():
        torch.save(embedded(root, [text for *_, text in rows]), path)
    features = torch.load(path, weights_only=True).float()
    genres, groups, scores, _ = zip(*rows, strict=True)
    return Loaded(features, torch.tensor(scores), list(genres), [], list(groups))


def make_model() -> nn.Module:
    """Make a perceptron with one output."""
    return nn.Sequential(nn.Linear(384, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1))


def squared(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the mean squared error of the scores of a batch."""
    inputs, targets = batch
    return functional.mse_loss(model(inputs).squeeze(1), targets)


def closeness(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Return the absolute errors of the scores of a batch, negative, shape (B,): the larger the better."""
    inputs, targets = batch
    return -(model(inputs).squeeze(1) - targets).abs()


SOURCE = Source(
    "sentiment",
    "Sentiment by genre",
    "another kind of text; scores differ in their mean and spread, too",
    COMMAND,
    "MIT (of the package, which ships the texts)",
    (
        "Scores from -4 to 4, means of twenty people: of tweets, film reviews, sentences of product reviews and news.",
        "Sentences of one review or article are a group. The metric is the absolute error, negative.",
    ),
    load,
    make_model,
    squared,
    closeness,
)
