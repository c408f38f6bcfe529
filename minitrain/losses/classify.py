"""Labels of texts, or numbers: classification and regression."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import MAX_NUMBER, option
from minitrain.errors import ConfigError, DataError

from .base import AddedFeatures, DataFile, Loss, LossOutput, Models, register_loss


@dataclass
class ClassifyOptions:
    labels: list[Any] = option([], "The labels in the order of the model's outputs; those of the training files.")
    positive_label: str | None = option(None, "Of two labels, the one that f1 is about; the last one when left out.")
    label_smoothing: float = option(0.0, "Weight of the mean negative log-probability over all labels.", ge=0, le=1)
    class_weights: dict[str, float] = option({}, "What examples of a label count, as {label: 2.5}; 1 when left out.")
    regression: bool = option(False, "The labels are numbers, and the loss is the squared error.")


@register_loss("classify", ClassifyOptions)
class Classify(Loss):
    """``-log p(label)`` by a softmax over the model's outputs, or ``(output - number)^2``; the unit is the example.

    With class weights w the loss is ``sum w(label) * (-log p) / sum w(label)``, and with smoothing e that of
    `torch.nn.functional.cross_entropy` (Szegedy et al. 2015, arXiv 1512.00567).
    """

    example_type = "classification"

    def __init__(self, options: ClassifyOptions):
        super().__init__(options)
        self.names = [str(name) for name in options.labels]

    def unused_options(self) -> dict[str, str]:
        classes = ("labels", "positive_label", "label_smoothing", "class_weights")
        return dict.fromkeys(classes, "regression has no classes.") if self.options.regression else {}

    def conflicts(self) -> dict[str, str]:
        if self.options.regression:
            return {}
        found = self._unfit() if self.names else {}
        if not all(0 < weight <= MAX_NUMBER for weight in self.options.class_weights.values()):
            found["class_weights"] = f"a weight has to be above 0, and {MAX_NUMBER} or less."
        return found

    @property
    def head_labels(self) -> list[str]:
        """The labels; known after `on_data_loaded`, if they are not an option."""
        return ["score"] if self.options.regression else self.names

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> list[AddedFeatures]:
        """Return labels that are numbered in the same way in all files; for regression, the numbers themselves.

        Raises:
            ConfigError: For options that do not fit the labels.
            DataError: For a label that is not in the training data or, for regression, not a number.
        """
        if not self.options.regression:
            self.names = self.names or _sorted_names(train)
            for key, reason in self._unfit().items():
                raise ConfigError(f"loss.{key}: {reason}", "conflict")
        places = {name: place for place, name in enumerate(self.names)}
        added = []
        for file in {id(file): file for file in (*train, *eval)}.values():  # one may be split into both
            meant = [
                _number(name, file) if self.options.regression else _place(name, places, file) for name in file.labels
            ]
            label = np.array(meant, np.float64)[file.doc_features["label"].astype(int)]  # [D]
            added.append(AddedFeatures(file, {"label": label}, labels=self.names))
        return added

    def _unfit(self) -> dict[str, str]:
        """Options that do not fit the labels, each with the reason."""
        found = {}
        if len(set(self.names)) != len(self.names):
            found["labels"] = f"a label stands twice in {', '.join(self.names)}. List each label once."
        for key, named in (
            ("class_weights", self.options.class_weights),
            ("positive_label", [self.options.positive_label]),
        ):
            unknown = [name for name in named if name is not None and name not in self.names]
            if unknown:
                found[key] = f"there is no label {unknown[0]!r}; there are {', '.join(self.names)}."
        if self.options.positive_label and len(self.names) != 2:
            found["positive_label"] = f"would be ignored: of {len(self.names)} labels f1 is a mean over all."
        return found

    def num_items(self, batch: Batch) -> Tensor:
        labels = batch.doc_feature("label")  # [D]
        if not self.options.class_weights:
            return torch.tensor(float(batch.n_docs), device=labels.device)
        return self._class_weights(labels.device)[labels.long()].sum()

    def _class_weights(self, device: torch.device) -> Tensor:
        """[L]"""
        given = self.options.class_weights
        return torch.tensor([given.get(name, 1.0) for name in self.names], device=device)

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        scores, labels = models.policy(batch).scores, batch.doc_feature("label")  # [D, L], [D]
        if self.options.regression:
            loss, predictions, metrics = ((scores[:, 0] - labels) ** 2).sum(), scores[:, 0].detach(), {}
        else:
            weights = self._class_weights(scores.device) if self.options.class_weights else None
            loss = F.cross_entropy(
                scores, labels.long(), weights, reduction="sum", label_smoothing=self.options.label_smoothing
            )
            predictions = scores.detach().argmax(1)  # [D]
            metrics = {"accuracy": ((predictions == labels).sum(), labels.new_tensor(float(batch.n_docs)))}
        return LossOutput(loss, self.num_items(batch), metrics, {"label": labels, "prediction": predictions})

    def compute_eval_metrics(self, samples: dict[str, list[float]]) -> dict[str, float]:
        labels, predictions = (np.array(samples.get(name, [])) for name in ("label", "prediction"))  # [n]
        if not len(labels):
            return {}
        if self.options.regression:
            return {"pearson": pearson(predictions, labels), "spearman": spearman(predictions, labels)}
        counts = confusion(labels.astype(int), predictions.astype(int), len(self.names))
        positive = None
        if len(self.names) == 2:
            positive = self.names.index(self.options.positive_label or self.names[-1])
        return precision_recall_f1(counts, positive) | {"matthews": matthews(counts)}


def _sorted_names(files: Sequence[DataFile]) -> list[str]:
    """All labels of the files, as numbers when all are, else by the alphabet. Raises DataError."""
    names = {name for file in files for name in file.labels}
    sources = ", ".join(sorted({file.source for file in files}))
    if len(names) < 2:
        raise DataError(
            f"{sources}: all examples have the label {min(names)!r}, so there is nothing to tell apart",
            "unsuitable-data",
        )
    numbers = {name: _parsed(name) for name in names}
    if not all(map(math.isfinite, numbers.values())):
        return sorted(names)
    ordered = sorted(names, key=lambda name: (numbers[name], name))
    for one, other in itertools.pairwise(ordered):
        if numbers[one] == numbers[other]:
            raise DataError(
                f"{sources}: the labels {one!r} and {other!r} are one number; write it in one way", "unsuitable-data"
            )
    return ordered


def _place(name: str, places: dict[str, int], file: DataFile) -> int:
    if name not in places:
        told = f"{file.source}: the label {name!r} is not among {_few(list(places))}"
        raise DataError(
            f"{told}, which are those of training. If labels are numbers to learn, set loss.regression=true", "mismatch"
        )
    return places[name]


def _few(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _number(name: str, file: DataFile) -> float:
    if not math.isfinite(_parsed(name)):
        raise DataError(
            f"{file.source}: the label {name!r} is no number, which loss.regression=true needs", "invalid-row"
        )
    return _parsed(name)


def _parsed(name: str) -> float:
    """The number that a label is; NaN for a text."""
    try:
        return float(name)
    except ValueError:
        return math.nan


# --------------------------------------------------------------------------------------------------------- figures


def confusion(labels: np.ndarray, predictions: np.ndarray, n_labels: int) -> np.ndarray:
    """How often each label [row] was taken for each [column]: [n], [n] -> [L, L]."""
    counts = np.zeros((n_labels, n_labels))
    np.add.at(counts, (labels, predictions), 1)
    return counts


def precision_recall_f1(counts: np.ndarray, positive: int | None) -> dict[str, float]:
    """Of one label, or the plain mean over the labels that occur; [L, L] confusion. 0 where nothing is to divide by."""
    hits, taken, there = counts.diagonal(), counts.sum(0), counts.sum(1)  # [L] each
    chosen = there + taken > 0 if positive is None else np.arange(len(counts)) == positive
    figures = {"f1": (2 * hits, taken + there), "precision": (hits, taken), "recall": (hits, there)}
    return {name: float((above / np.maximum(below, 1))[chosen].mean()) for name, (above, below) in figures.items()}


def matthews(counts: np.ndarray) -> float:
    """Correlation of labels and predictions, R_K for more than two (Gorodkin 2004); 0 if one of them is constant."""
    taken, there, n = counts.sum(0), counts.sum(1), counts.sum()  # [L], [L]
    spread = (n**2 - (taken**2).sum()) * (n**2 - (there**2).sum())
    return float((n * counts.trace() - taken @ there) / math.sqrt(spread)) if spread else 0.0


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of [n] and [n]; NaN if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else math.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks, equal numbers having their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """[n] -> [n]; of k equal numbers behind m smaller ones each has m + (k + 1) / 2."""
    _, which, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
