"""Sequence classification and regression."""

import contextlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitrain.batch import Batch, to_device
from minitrain.config.option import MAX_NUMBER, option
from minitrain.errors import ConfigError, DataError

from .base import AddedFeatures, DataFile, Loss, LossOutput, Models, register_loss, scalar


@dataclass
class ClassifyOptions:
    labels: list[Any] = option(
        [], "Labels in the order of the model's outputs (default: sorted labels of the training files)."
    )
    positive_label: str | None = option(None, "Label that f1 is computed for, of two labels (default: the last one).")
    label_smoothing: float = option(0.0, "Weight of the mean negative log-probability over all labels.", ge=0, le=1)
    class_weights: dict[str, float] = option({}, "Weight of each label's examples, as {label: 2.5} (default: 1).")
    regression: bool = option(False, "Treat labels as numbers, with the squared error as loss.")
    multi_label: bool = option(False, "Each text has a list of labels, any number of them.")


@register_loss("classify", ClassifyOptions)
class Classify(Loss):
    """``-log p(label)`` by a softmax over the model's outputs, or ``(output - number)^2``; the unit is the example.

    With `multi_label`, the mean over the labels of the binary cross entropy, in which class weights multiply the term
    of a label that the text has.

    With class weights w the loss is ``sum w(label) * (-log p) / sum w(label)``, and with smoothing e that of
    `torch.nn.functional.cross_entropy` (Szegedy et al. 2015, arXiv 1512.00567).
    """

    example_type = "classification"

    def __init__(self, options: ClassifyOptions):
        super().__init__(options)
        self.names = [str(name) for name in options.labels]
        self.label_sets = torch.zeros(0, 0)  # [S, L] 1 for the labels of each distinct list, if `multi_label`

    @property
    def multi_label(self) -> bool:
        """Whether a text has any number of labels."""
        return self.options.multi_label

    def unused_options(self) -> dict[str, str]:
        if self.options.regression:
            classes = ("labels", "positive_label", "label_smoothing", "class_weights")
            return dict.fromkeys(classes, "regression has no classes.")
        of_softmax = ("positive_label", "label_smoothing")
        return dict.fromkeys(of_softmax, "it is for one label of each text.") if self.options.multi_label else {}

    def conflicts(self) -> dict[str, str]:
        if self.options.regression:
            reason = "conflicts with loss.regression, whose labels are numbers. Remove one of them."
            return {"multi_label": reason} if self.options.multi_label else {}
        conflicts = self._label_conflicts() if self.names else {}
        if not all(0 < weight <= MAX_NUMBER for weight in self.options.class_weights.values()):
            conflicts["class_weights"] = f"must be above 0 and at most {MAX_NUMBER} for every label."
        return conflicts

    @property
    def head_labels(self) -> list[str]:
        """The labels. Without the option `labels` they are known after `on_data_loaded`."""
        return ["score"] if self.options.regression else self.names

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> list[AddedFeatures]:
        """Return the labels as indices that are the same in all files or, for regression, as numbers.

        With `multi_label`, they are indices into `label_sets`.

        Raises:
            ConfigError: For options that do not match the labels.
            DataError: For a label that is not in the training data or, for regression, not a number.
        """
        if not self.options.regression:
            self.names = self.names or _sorted_names(train, self.multi_label)
            for key, reason in self._label_conflicts().items():
                raise ConfigError(f"loss.{key}: {reason}", "conflict")
        indices = {name: index for index, name in enumerate(self.names)}
        files = list({id(file): file for file in (*train, *eval)}.values())  # one may be split into both
        lists = [name for file in files for name in file.labels] if self.multi_label else []
        self.label_sets = torch.zeros(len(lists), len(self.names))
        added, n_before = [], 0
        for file in files:
            if self.options.regression:
                numbers = [_to_number(name, file) for name in file.labels]
            elif self.multi_label:
                numbers = list(range(n_before, n_before := n_before + len(file.labels)))
                for number, name in zip(numbers, file.labels, strict=True):
                    self.label_sets[number, [_to_index(one, indices, file) for one in _members(name)]] = 1.0
            else:
                numbers = [_to_index(name, indices, file) for name in file.labels]
            label = np.array(numbers, np.float64)[file.doc_features["label"].astype(int)]  # [D]
            added.append(AddedFeatures(file, {"label": label}, labels=lists or self.names))
        return added

    def _label_conflicts(self) -> dict[str, str]:
        """Return the options that do not match the labels, each with the reason."""
        conflicts = {}
        if len(set(self.names)) != len(self.names):
            conflicts["labels"] = f"duplicate label in {', '.join(self.names)}. List each label once."
        for key, names in (
            ("class_weights", self.options.class_weights),
            ("positive_label", [self.options.positive_label]),
        ):
            unknown = [name for name in names if name is not None and name not in self.names]
            if unknown:
                conflicts[key] = f"unknown label {unknown[0]!r}. Use one of {', '.join(self.names)}."
        if self.options.positive_label and len(self.names) != 2:
            reason = f"has no effect with {len(self.names)} labels: f1 is then a mean over all labels. Remove it."
            conflicts["positive_label"] = reason
        return conflicts

    def num_items(self, batch: Batch) -> Tensor:
        labels = batch.doc_feature("label")  # [D]
        if not self.options.class_weights or self.multi_label:
            return scalar(batch.n_docs, batch)
        return self._class_weights(labels.device)[labels.long()].sum()

    def _class_weights(self, device: torch.device) -> Tensor:
        weights = self.options.class_weights
        return to_device(torch.tensor([weights.get(name, 1.0) for name in self.names]), device)  # [L]

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        scores, labels = models.policy(batch).scores, batch.doc_feature("label")  # [D, L], [D]
        if self.multi_label:
            return self._of_label_sets(scores, labels, batch)
        if self.options.regression:
            loss, predictions, metrics = ((scores[:, 0] - labels) ** 2).sum(), scores[:, 0].detach(), {}
        else:
            weights = self._class_weights(scores.device) if self.options.class_weights else None
            loss = F.cross_entropy(
                scores, labels.long(), weights, reduction="sum", label_smoothing=self.options.label_smoothing
            )
            predictions = scores.detach().argmax(1)  # [D]
            metrics = {"accuracy": ((predictions == labels).sum(), scalar(batch.n_docs, batch))}
        return LossOutput(loss, self.num_items(batch), metrics, {"label": labels, "prediction": predictions})

    def _of_label_sets(self, scores: Tensor, labels: Tensor, batch: Batch) -> LossOutput:
        """Return the loss of scores [D, L] for indices into `label_sets` [D]."""
        weights = self._class_weights(scores.device) if self.options.class_weights else None
        actual = to_device(self.label_sets, scores.device)[labels.long()]  # [D, L]
        loss = F.binary_cross_entropy_with_logits(scores, actual, pos_weight=weights, reduction="sum")
        predicted, n = (scores.detach() > 0).float(), self.num_items(batch)  # [D, L], []
        metrics = {"accuracy": ((predicted == actual).all(1).sum(), n)}
        for name, counts in zip(COUNTS, (predicted * actual, predicted, actual), strict=True):
            metrics |= {f"{name}/{label}": (count, n) for label, count in enumerate(counts.sum(0))}
        return LossOutput(loss / len(self.names), n, metrics)

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Replace the counts of each label by F1, over all decisions (micro) and as the mean over labels (macro)."""
        if not self.multi_label:
            return means
        labels = range(len(self.names))
        hits, predicted, actual = (np.array([means.pop(f"{name}/{i}", 0.0) for i in labels]) for name in COUNTS)  # [L]
        total, occurs = predicted + actual, predicted + actual > 0
        macro = (2 * hits / np.where(occurs, total, 1))[occurs]
        f1 = {"f1_micro": 2 * hits.sum() / total.sum(), "f1_macro": macro.mean()} if occurs.any() else {}
        return means | {name: float(value) for name, value in f1.items()}

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


COUNTS = ("hits", "predicted", "actual")  # of each label, to compute F1


def _members(name: str) -> list[str]:
    """Return the labels of a list, which is written as JSON; a text with one label may have it alone."""
    with contextlib.suppress(ValueError):
        if isinstance(members := json.loads(name), list):
            return members
    return [name]


def _sorted_names(files: Sequence[DataFile], multi_label: bool) -> list[str]:
    """Return all labels of the files, sorted as numbers if all are numbers. Raise DataError."""
    written = {name for file in files for name in file.labels}
    names = {one for name in written for one in _members(name)} if multi_label else written
    sources = ", ".join(sorted({file.source for file in files}))
    if not multi_label and (lists := [name for name in written if _members(name) != [name]]):
        raise DataError(
            f"{sources}: an example has the list of labels {lists[0]}. Set loss.multi_label=true.", "unsuitable-data"
        )
    if len(names) < 2:
        raise DataError(
            f"{sources}: expected at least 2 labels, got {', '.join(map(repr, names)) or 'none'}. Add examples of "
            "another label.",
            "unsuitable-data",
        )
    numbers = {name: _parse_number(name) for name in names}
    if not all(map(math.isfinite, numbers.values())):
        return sorted(names)
    ordered = sorted(names, key=lambda name: (numbers[name], name))
    for one, other in itertools.pairwise(ordered):
        if numbers[one] == numbers[other]:
            raise DataError(
                f"{sources}: the labels {one!r} and {other!r} are the same number. Write it the same way in all rows.",
                "unsuitable-data",
            )
    return ordered


def _to_index(name: str, indices: dict[str, int], file: DataFile) -> int:
    if name not in indices:
        known = ", ".join(list(indices)[:10]) + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")
        raise DataError(
            f"{file.source}: the label {name!r} is not one of the labels in training, {known}. Fix the label, or set "
            "loss.regression=true if labels are numbers.",
            "mismatch",
        )
    return indices[name]


def _to_number(name: str, file: DataFile) -> float:
    if not math.isfinite(_parse_number(name)):
        raise DataError(
            f"{file.source}: the label {name!r} is not a number. Fix it, or set loss.regression=false.", "invalid-row"
        )
    return _parse_number(name)


def _parse_number(name: str) -> float:
    """Return the label as a number, or NaN."""
    try:
        return float(name)
    except ValueError:
        return math.nan


# --------------------------------------------------------------------------------------------------------- metrics


def confusion(labels: np.ndarray, predictions: np.ndarray, n_labels: int) -> np.ndarray:
    """Return the confusion matrix, label by prediction: [n], [n] -> [L, L]."""
    counts = np.zeros((n_labels, n_labels))
    np.add.at(counts, (labels, predictions), 1)
    return counts


def precision_recall_f1(counts: np.ndarray, positive: int | None) -> dict[str, float]:
    """Return the metrics of one label, or their mean over the labels that occur, from an [L, L] confusion matrix.

    A ratio whose denominator is 0 counts as 0.
    """
    hits, predicted, actual = counts.diagonal(), counts.sum(0), counts.sum(1)  # [L] each
    chosen = actual + predicted > 0 if positive is None else np.arange(len(counts)) == positive
    ratios = {"f1": (2 * hits, predicted + actual), "precision": (hits, predicted), "recall": (hits, actual)}
    return {name: float((above / np.maximum(below, 1))[chosen].mean()) for name, (above, below) in ratios.items()}


def matthews(counts: np.ndarray) -> float:
    """Return the correlation of labels and predictions, R_K for more than two labels (Gorodkin 2004).

    It is 0 if labels or predictions are constant.
    """
    predicted, actual, n = counts.sum(0), counts.sum(1), counts.sum()  # [L], [L]
    spread = (n**2 - (predicted**2).sum()) * (n**2 - (actual**2).sum())
    return float((n * counts.trace() - predicted @ actual) / math.sqrt(spread)) if spread else 0.0


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of [n] and [n], or NaN if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    spread = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / spread) if spread else math.nan


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of the ranks. Equal numbers share their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(numbers: np.ndarray) -> np.ndarray:
    """Return ranks, [n] -> [n]. k equal numbers that follow m smaller ones have the rank m + (k + 1) / 2."""
    _, group, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]
