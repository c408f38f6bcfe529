"""What the rooms hand to one another: `Batch` goes into the model, `Scores` comes out.

Shapes: R rows of T tokens hold D documents; N of the tokens are supervised.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass
class Batch:
    """Rows of documents. A row holds one document (padded) or several (packed).

    `labels` are not shifted: `labels[r, t]` is `input_ids[r, t]` where that token is to be learned and
    -100 elsewhere; the first token of a document is never learned. `doc_ids` is -1 on padding, and
    `position_ids` restart at each document, which is what keeps documents of one row apart.
    """

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64
    labels: Tensor  # [R, T] int64
    doc_ids: Tensor  # [R, T] int64
    n_docs: int

    def __post_init__(self):
        rows, columns = (self.labels[:, 1:] != IGNORE).nonzero(as_tuple=True)  # [N], [N]
        self.predictors = rows * self.labels.shape[1] + columns  # [N] flat place whose next token is learned
        self.targets = self.labels[rows, columns + 1]  # [N]
        self.target_docs = self.doc_ids[rows, columns + 1]  # [N]
        self.spans = _spans(self.doc_ids)  # [D, 3] (row, start, stop) in order; stays on the CPU

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents."""
        return self.n_docs > self.input_ids.shape[0]

    @property
    def n_labels(self) -> int:
        """N, the number of supervised tokens."""
        return self.targets.numel()

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding. Call it before `to`, where it would wait for the device."""
        return int((self.doc_ids >= 0).sum())

    def to(self, device: torch.device) -> "Batch":
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "spans":
                setattr(moved, name, value.to(device, non_blocking=True))
        return moved


def _spans(doc_ids: Tensor) -> Tensor:
    """Where each document lies, from [R, T] doc_ids -> [D, 3]."""
    edge = torch.full_like(doc_ids[:, :1], -1)  # [R, 1]
    real = doc_ids >= 0
    rows, starts = (real & (doc_ids != torch.cat([edge, doc_ids[:, :-1]], 1))).nonzero(as_tuple=True)  # [D], [D]
    _, lasts = (real & (doc_ids != torch.cat([doc_ids[:, 1:], edge], 1))).nonzero(as_tuple=True)  # [D]
    return torch.stack([rows, starts, lasts + 1], 1)


@dataclass
class Scores:
    """What a loss may know of the policy's output, one entry for each supervised token."""

    logps: Tensor  # [N] float32, log p(target)
    doc_ids: Tensor  # [N] int64, the document each target belongs to
    n_docs: int
    entropy: Tensor | None = None  # [N] float32, of the whole distribution, when asked for
    mean_logps: Tensor | None = None  # [N] float32, mean over the vocabulary, when asked for

    def per_document(self, values: Tensor) -> Tensor:
        """Sums [N] values over each document -> [D]."""
        return values.new_zeros(self.n_docs).index_add(0, self.doc_ids, values)
