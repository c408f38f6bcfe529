"""What the rooms hand to one another: `Batch` goes into the model, `PolicyOutput` comes out.

Shapes: R rows of T tokens hold D documents; N of the tokens are supervised.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class Batch:
    """Rows of documents. A row holds one document (padded) or several (packed).

    `labels` are not shifted: `labels[r, t]` is `input_ids[r, t]` where that token is to be learned and
    -100 elsewhere; the first token of a document is never learned. `doc_ids` is -1 on padding, and
    `position_ids` restart at each document, which is what keeps documents of one row apart.

    A document may begin with tokens of an earlier one in its row, a prompt that several answers share: these are
    laid out once, as the earlier one's, and `prefixes[d]` says where (start, stop) in the row they are.
    """

    input_ids: Tensor  # [R, T] int64
    position_ids: Tensor  # [R, T] int64
    labels: Tensor  # [R, T] int64
    doc_ids: Tensor  # [R, T] int64
    n_docs: int
    prefixes: Tensor | None = None  # [D, 2] int64 on the CPU, (0, 0) for a document that shares nothing
    doc_features: dict[str, Tensor] = field(default_factory=dict)  # name -> [D] float32, of each document
    token_features: dict[str, Tensor] = field(default_factory=dict)  # name -> [R, T, ...], of each token

    def __post_init__(self):
        rows, columns = (self.labels != IGNORE_INDEX).nonzero(as_tuple=True)  # [N], [N]
        self.targets = self.labels[rows, columns]  # [N]
        self.target_docs = self.doc_ids[rows, columns]  # [N]
        self.target_positions = rows * self.labels.shape[1] + columns  # [N] flat place of each target
        self.predict_positions = self.target_positions - 1  # [N] flat place whose next token is learned
        self.spans = _spans(self.doc_ids)  # [D, 3] (row, start, stop) in order; stays on the CPU
        if self.prefixes is not None:
            row, start, _ = self.spans.T
            first = (self.prefixes[:, 1] > 0)[self.target_docs] & (columns == start[self.target_docs])  # [N]
            before = (row * self.labels.shape[1] + self.prefixes[:, 1] - 1)[self.target_docs]  # [N]
            self.predict_positions = torch.where(first, before, self.predict_positions)

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents."""
        return self.n_docs > self.input_ids.shape[0]

    @property
    def n_targets(self) -> int:
        """N, the number of supervised tokens."""
        return self.targets.numel()

    @property
    def docs_with_targets(self) -> Tensor:
        """Which documents have supervised tokens -> [D] bool."""
        learned = torch.zeros(self.n_docs, dtype=torch.bool, device=self.targets.device)
        return learned.index_fill_(0, self.target_docs, True)

    @property
    def last_token_positions(self) -> Tensor:
        """Flat place of each document's last token -> [D] int64, on the CPU."""
        return self.spans[:, 0] * self.labels.shape[1] + self.spans[:, 2] - 1

    def doc_feature(self, name: str) -> Tensor:
        """A value of each document -> [D] float32."""
        return self.doc_features[name] if self.n_docs else torch.zeros(0, device=self.targets.device)

    def target_feature(self, name: str) -> Tensor:
        """A column at the supervised tokens -> [N, ...]."""
        if not self.n_docs:
            return torch.zeros(0, device=self.targets.device)
        return self.token_features[name].flatten(0, 1)[self.target_positions]

    @property
    def layout(self) -> Tensor:
        """(row, start, stop) of each document, and (start, stop) of what it shares, if any do -> [D, 3 or 5]."""
        return self.spans if self.prefixes is None else torch.cat([self.spans, self.prefixes], 1)

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding. Call it before `to`, where it would wait for the device."""
        return int((self.doc_ids >= 0).sum())

    def to(self, device: torch.device) -> "Batch":
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in ("spans", "prefixes"):
                setattr(moved, name, value.to(device, non_blocking=True))
        for name in ("doc_features", "token_features"):
            tensors = getattr(self, name).items()
            setattr(moved, name, {key: tensor.to(device, non_blocking=True) for key, tensor in tensors})
        return moved


def _spans(doc_ids: Tensor) -> Tensor:
    """Where each document lies, from [R, T] doc_ids -> [D, 3]."""
    edge = torch.full_like(doc_ids[:, :1], -1)  # [R, 1]
    real = doc_ids >= 0
    rows, starts = (real & (doc_ids != torch.cat([edge, doc_ids[:, :-1]], 1))).nonzero(as_tuple=True)  # [D], [D]
    _, lasts = (real & (doc_ids != torch.cat([doc_ids[:, 1:], edge], 1))).nonzero(as_tuple=True)  # [D]
    return torch.stack([rows, starts, lasts + 1], 1)


@dataclass
class PolicyOutput:
    """What a loss may know of the policy's output: of each supervised token, or `scores` of each document."""

    logps: Tensor | None  # [N] float32, log p(target); None of a model that has no vocabulary at its end
    doc_ids: Tensor  # [N] int64, the document each target belongs to
    n_docs: int
    entropy: Tensor | None = None  # [N] float32, of the whole distribution, when asked for
    mean_logps: Tensor | None = None  # [N] float32, mean over the vocabulary, when asked for
    values: Tensor | None = None  # [N] float32, of the text before each target, from a value head
    scores: Tensor | None = None  # [D, L] float32, outputs of a scalar head at each document's last token
    divergence: Tensor | None = None  # [N] float32, from a teacher's distribution, when asked for

    def per_document(self, values: Tensor) -> Tensor:
        """Sums [N] values over each document -> [D]."""
        return values.new_zeros(self.n_docs).index_add(0, self.doc_ids, values)


class TopKLogprobs(NamedTuple):
    """A teacher's k likeliest tokens at each supervised token, of its V tokens, and all others as one more outcome."""

    ids: Tensor  # [N, k] integers
    logps: Tensor  # [N, k + 1] float32, at the temperature; the last one is that of all others
    n_tokens: int  # V


class Distillation(NamedTuple):
    """What a policy is compared with at the supervised tokens, and how."""

    teacher: Any  # (hidden states [N, H], LM head) of `Policy.target_hidden_states`, or `TopKLogprobs`
    formula: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # see `losses/kd.py`
    temperature: float  # of both
    top_k: int | None = None  # compare on the teacher's k likeliest tokens and the rest; all for None
    weights: tuple[float, float] = (1.0, 0.0)  # of the divergence and of -log p(target) in the loss, to save a pass


@dataclass
class Document:
    """Tokens, which of them are learned, and numbers that belong to all of it or to each token."""

    ids: Tensor  # [T] int32
    mask: Tensor  # [T] uint8
    shared: int = 0  # leading tokens that are those of the last document before it in its row that has 0 here
    doc_features: dict[str, float] = field(default_factory=dict)
    token_features: dict[str, Tensor] = field(default_factory=dict)  # name -> [T, ...]


def collate(rows: list[list[Document]], pad_token_id: int) -> Batch:
    """Lays documents side by side in rows; without rows, one row of padding that has no labels.

    All documents must have the same doc_features and token_features.
    """
    n_columns = max((sum(len(d.ids) - d.shared for d in row) for row in rows), default=2)
    shape = (max(1, len(rows)), n_columns)
    input_ids = torch.full(shape, pad_token_id)  # [R, T]
    labels = torch.full(shape, IGNORE_INDEX)  # [R, T]
    doc_ids = torch.full(shape, -1)  # [R, T]
    # Padding continues the positions: a restart would look like one more document and cost an attention mask.
    position_ids = torch.arange(n_columns).repeat(shape[0], 1)  # [R, T]
    documents = [document for row in rows for document in row]
    columns = {
        name: column.new_zeros(*shape, *column.shape[1:])  # [R, T, ...]
        for name, column in (documents[0].token_features if documents else {}).items()
    }
    prefixes = torch.zeros(len(documents), 2, dtype=torch.int64)  # [D, 2]
    n_docs = 0
    for r, row in enumerate(rows):
        start = owner = length = 0
        for document in row:
            shared = document.shared
            assert not shared or start > owner
            own = slice(shared, None)
            length = len(document.ids)
            span = slice(start, start + length - shared)
            ids = document.ids[own].long()
            input_ids[r, span] = ids
            labels[r, span] = torch.where(document.mask[own].bool(), ids, IGNORE_INDEX)
            doc_ids[r, span] = n_docs
            position_ids[r, span] = torch.arange(shared, length)
            for name, column in document.token_features.items():
                columns[name][r, span] = column[own]
            if shared:
                prefixes[n_docs] = torch.tensor([owner, owner + shared])
            else:
                owner = start
            n_docs += 1
            start = span.stop
        position_ids[r, start:] = torch.arange(length, length + n_columns - start)
    values = {
        name: torch.tensor([document.doc_features[name] for document in documents])  # [D]
        for name in (documents[0].doc_features if documents else {})
    }
    shares = prefixes if prefixes.any() else None
    return Batch(input_ids, position_ids, labels, doc_ids, n_docs, shares, values, columns)
