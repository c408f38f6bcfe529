"""Data types that packages share: `Batch` is the input of the model, `PolicyOutput` its output.

Shapes: R batch rows of T tokens have D documents; N of the tokens are targets.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
TARGET_WEIGHTS = "target_weights"  # the token feature that weighs tokens in the loss; all weigh 1 without it


@dataclass
class Batch:
    """Batch rows of documents: one padded document per row, or several packed ones.

    Attributes:
        input_ids: Token ids, int64, shape [R, T].
        position_ids: Positions in the document, int64, shape [R, T]. They restart at each document, which separates the
            documents of a row.
        labels: `input_ids` at targets and -100 elsewhere, int64, shape [R, T]. They are not shifted. The first token of
            a document is never a target.
        doc_ids: Number of the document, -1 at padding, int64, shape [R, T].
        n_docs: D.
        prefixes: (start, stop) in the row of each document's shared prompt, int64 on the CPU, shape [D, 2]. A document
            can begin with the prompt of an earlier one in its row, which only has it once. (0, 0) without one.
        doc_features: Name -> a value of each document, float32, shape [D].
        token_features: Name -> values of each token, shape [R, T, ...].
    """

    input_ids: Tensor  # [R, T]
    position_ids: Tensor  # [R, T]
    labels: Tensor  # [R, T]
    doc_ids: Tensor  # [R, T]
    n_docs: int
    prefixes: Tensor | None = None  # [D, 2]
    doc_features: dict[str, Tensor] = field(default_factory=dict)
    token_features: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        rows, columns = (self.labels != IGNORE_INDEX).nonzero(as_tuple=True)  # [N], [N]
        self.targets = self.labels[rows, columns]  # [N]
        self.target_docs = self.doc_ids[rows, columns]  # [N]
        self.target_positions = rows * self.labels.shape[1] + columns  # [N] flat position of each target
        self.predict_positions = self.target_positions - 1  # [N] flat position that predicts the target
        self.spans = _spans(self.doc_ids)  # [D, 3] (row, start, stop), on the CPU
        if self.prefixes is not None:
            row, start, _ = self.spans.T
            is_first = (self.prefixes[:, 1] > 0)[self.target_docs] & (columns == start[self.target_docs])  # [N]
            before = (row * self.labels.shape[1] + self.prefixes[:, 1] - 1)[self.target_docs]  # [N]
            self.predict_positions = torch.where(is_first, before, self.predict_positions)

    def __repr__(self) -> str:
        rows, tokens = self.input_ids.shape
        return f"<Batch: {self.n_docs} documents in {rows} rows of {tokens} tokens, {self.n_targets} targets>"

    @property
    def packed(self) -> bool:
        """Return whether a row has several documents."""
        return self.n_docs > self.input_ids.shape[0]

    @property
    def n_targets(self) -> int:
        """Return N, the number of targets."""
        return self.targets.numel()

    @property
    def docs_with_targets(self) -> Tensor:
        """Return whether each document has targets, bool, shape [D]."""
        has_targets = torch.zeros(self.n_docs, dtype=torch.bool, device=self.targets.device)
        return has_targets.index_fill_(0, self.target_docs, True)

    @property
    def last_token_positions(self) -> Tensor:
        """Return the flat position of each document's last token, int64 on the CPU, shape [D]."""
        return self.spans[:, 0] * self.labels.shape[1] + self.spans[:, 2] - 1

    def doc_feature(self, name: str) -> Tensor:
        """Return a feature of the documents, float32, shape [D]."""
        return self.doc_features[name] if self.n_docs else torch.zeros(0, device=self.targets.device)

    def target_feature(self, name: str) -> Tensor:
        """Return a token feature at the targets, shape [N, ...]."""
        if not self.n_docs:
            return torch.zeros(0, device=self.targets.device)
        return self.token_features[name].flatten(0, 1)[self.target_positions]

    @property
    def target_weights(self) -> Tensor | None:
        """Return the weights of the targets in the loss, float32, shape [N]; None if all are 1."""
        return self.target_feature(TARGET_WEIGHTS) if TARGET_WEIGHTS in self.token_features else None

    @property
    def layout(self) -> Tensor:
        """Return `spans`, with the columns of `prefixes` if there are any, shape [D, 3 or 5]."""
        return self.spans if self.prefixes is None else torch.cat([self.spans, self.prefixes], 1)

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens that are not padding. Call it before `to`: later it would wait for the device."""
        return int((self.doc_ids >= 0).sum())

    def with_row_per_document(self, positions: Tensor, lengths: Tensor) -> "Batch":
        """Return the tokens at flat positions as rows of one document each; it has no targets of its own.

        Args:
            positions: Flat positions of the G documents' tokens, then padding, shape [G, t].
            lengths: Number of tokens of each document, shape [G].
        """
        part = copy.copy(self)
        steps = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)  # [G, t]
        numbers = torch.arange(len(positions), device=positions.device)[:, None]  # [G, 1]
        part.input_ids = self.input_ids.view(-1)[positions]
        part.position_ids = steps
        part.doc_ids = torch.where((steps < lengths[:, None]) & (self.doc_ids.view(-1)[positions] >= 0), numbers, -1)
        part.n_docs, part.prefixes = len(positions), None
        return part

    def to(self, device: torch.device) -> "Batch":
        """Return a copy on a device; `spans` and `prefixes` stay on the CPU."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory, from which copies to a CUDA device do not wait for it."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a copy with a function applied to its tensors, except `spans` and `prefixes`."""
        mapped = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in ("spans", "prefixes"):
                setattr(mapped, name, function(value))
        for name in ("doc_features", "token_features"):
            setattr(mapped, name, {key: function(tensor) for key, tensor in getattr(self, name).items()})
        return mapped


def _spans(doc_ids: Tensor) -> Tensor:
    """Return (row, start, stop) of each document, shape [D, 3], from `doc_ids` [R, T]."""
    edge = torch.full_like(doc_ids[:, :1], -1)  # [R, 1]
    real = doc_ids >= 0
    rows, starts = (real & (doc_ids != torch.cat([edge, doc_ids[:, :-1]], 1))).nonzero(as_tuple=True)  # [D], [D]
    _, lasts = (real & (doc_ids != torch.cat([doc_ids[:, 1:], edge], 1))).nonzero(as_tuple=True)  # [D]
    return torch.stack([rows, starts, lasts + 1], 1)


@dataclass
class PolicyOutput:
    """The output of a policy: values of each target, or `scores` of each document.

    Attributes:
        logps: Log-probabilities of the targets, float32, shape [N]; None from a scalar head.
        doc_ids: Document of each target, int64, shape [N].
        n_docs: D.
        entropy: Entropy of the distribution at each target if requested, float32, shape [N].
        mean_logps: Mean log-probability over the vocabulary at each target if requested, float32, shape [N].
        values: Output of a value head before each target, float32, shape [N].
        scores: Output of a scalar head with L labels at the last token of each document, float32, shape [D, L].
        divergence: Divergence from the distribution of a teacher if requested, float32, shape [N].
    """

    logps: Tensor | None  # [N]
    doc_ids: Tensor  # [N]
    n_docs: int
    entropy: Tensor | None = None  # [N]
    mean_logps: Tensor | None = None  # [N]
    values: Tensor | None = None  # [N]
    scores: Tensor | None = None  # [D, L]
    divergence: Tensor | None = None  # [N]

    def per_document(self, values: Tensor) -> Tensor:
        """Return the sums of `values` [N] over each document, shape [D]."""
        return values.new_zeros(self.n_docs).index_add(0, self.doc_ids, values)


class TopKLogprobs(NamedTuple):
    """The k likeliest tokens of a teacher at each target, and all other tokens as one more outcome."""

    ids: Tensor  # [N, k] integers
    logps: Tensor  # [N, k + 1] float32, at the temperature; the last column is that of all other tokens
    n_tokens: int  # V, the size of the vocabulary


class Distillation(NamedTuple):
    """A teacher at the targets, and how the policy is compared with it.

    Attributes:
        teacher: (hidden states [N, H], LM head) of `Policy.target_hidden_states`, or `TopKLogprobs`.
        formula: Maps logps of policy and teacher to the divergence and its derivative; see `losses/kd.py`.
        temperature: Divides the logits of both.
        top_k: Compare the k likeliest tokens of the teacher, and the rest as one outcome; None compares all tokens.
        weights: Expected weights of the divergence and of -log p(target) in the loss. If they are right, the loss needs
            one pass less.
    """

    teacher: Any
    formula: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    temperature: float
    top_k: int | None = None
    weights: tuple[float, float] = (1.0, 0.0)


@dataclass
class Document:
    """One token sequence.

    Attributes:
        ids: Token ids, int32, shape [T].
        mask: 1 at targets, uint8, shape [T].
        shared: Number of leading tokens that the last document with 0 here, before it in its row, already has.
        doc_features: Name -> a value of the document.
        token_features: Name -> values of each token, shape [T, ...].
    """

    ids: Tensor  # [T]
    mask: Tensor  # [T]
    shared: int = 0
    doc_features: dict[str, float] = field(default_factory=dict)
    token_features: dict[str, Tensor] = field(default_factory=dict)


def collate(rows: list[list[Document]], pad_token_id: int) -> Batch:
    """Return a batch of these rows of documents; without rows, one row of padding without targets.

    All documents must have the same doc_features and token_features.
    """
    n_columns = max((sum(len(d.ids) - d.shared for d in row) for row in rows), default=2)
    shape = (max(1, len(rows)), n_columns)
    input_ids = torch.full(shape, pad_token_id)  # [R, T]
    labels = torch.full(shape, IGNORE_INDEX)  # [R, T]
    doc_ids = torch.full(shape, -1)  # [R, T]
    # Padding continues the positions: a restart would look like another document and need an attention mask.
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
