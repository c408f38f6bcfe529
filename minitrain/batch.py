"""Data types that packages share: `Batch` is the input of the model, `PolicyOutput` its output.

Shapes: R batch rows of T tokens have D documents; N of the tokens are targets.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100
ON_CPU = ("spans", "prefixes", "docs_with_targets")  # tensors of a batch that say how it is computed
TARGET_WEIGHTS = "target_weights"  # the token feature that weighs tokens in the loss; all weigh 1 without it


class Sequences(NamedTuple):
    """The documents of a batch for attention of variable lengths; the padding between documents counts as documents.

    Attributes:
        table: S + 1 cumulative numbers of queries, S + 1 of keys, and if documents share prompts, the flat positions of
            the K keys; int32, shape [2 S + 2 (+ K)]. It is one tensor, for one copy to a device.
        count: S, the number of sequences.
        max_q: Most queries of a sequence.
        max_k: Most keys of a sequence, with those of a shared prompt.
    """

    table: Tensor  # [2 S + 2 (+ K)]
    count: int
    max_q: int
    max_k: int


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
        docs_with_targets: Whether each document has targets, bool on the CPU, shape [D].
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
        labels, columns = self.labels.flatten(), self.labels.shape[1]  # [R * T]
        self.target_positions = (labels != IGNORE_INDEX).nonzero()[:, 0]  # [N] flat position of each target
        self.targets = labels.index_select(0, self.target_positions)  # [N]
        self.target_docs = self.doc_ids.flatten().index_select(0, self.target_positions)  # [N]
        self.predict_positions = self.target_positions - 1  # [N] flat position that predicts the target
        self.docs_with_targets = torch.zeros(self.n_docs, dtype=torch.bool).index_fill_(
            0, self.target_docs, True
        )  # [D]
        self.spans = _spans(self.doc_ids)  # [D, 3] (row, start, stop), on the CPU
        if self.prefixes is not None:
            row, start, _ = self.spans.T
            is_first = self.target_positions == (row * columns + start)[self.target_docs]  # [N]
            is_first &= (self.prefixes[:, 1] > 0)[self.target_docs]
            before = (row * columns + self.prefixes[:, 1] - 1)[self.target_docs]  # [N]
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
        return self.token_features[name].flatten(0, 1).index_select(0, self.target_positions)

    @property
    def target_weights(self) -> Tensor | None:
        """Return the weights of the targets in the loss, float32, shape [N]; None if all are 1."""
        return self.target_feature(TARGET_WEIGHTS) if TARGET_WEIGHTS in self.token_features else None

    @property
    def layout(self) -> Tensor:
        """Return `spans`, with the columns of `prefixes` if there are any, shape [D, 3 or 5]."""
        return self.spans if self.prefixes is None else torch.cat([self.spans, self.prefixes], 1)

    @functools.cached_property
    def sequences(self) -> Sequences:
        """Return the documents as sequences of queries and keys, on the device of the batch."""
        sequences, device = _sequences(self.layout, *self.input_ids.shape), self.input_ids.device
        return sequences._replace(table=to_device(sequences.table, device))

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
        part.spans = torch.zeros(0, 3, dtype=torch.int64)  # lengths are on the device; causal attention needs none
        vars(part).pop("sequences", None)
        return part

    def to(self, device: torch.device | str) -> "Batch":
        """Return a copy on a device, without waiting for it; `ON_CPU` stays on the CPU."""
        return self._map(lambda tensor: to_device(tensor, device))

    def pin_memory(self) -> "Batch":
        """Return a copy in pinned memory, from which `to` copies at once."""
        _ = self.sequences  # computed here, in the thread that prepares batches
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Return a copy with a function of each tensor that belongs on the device."""
        mapped = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in ON_CPU:
                setattr(mapped, name, function(value))
        for name in ("doc_features", "token_features"):
            setattr(mapped, name, {key: function(tensor) for key, tensor in getattr(self, name).items()})
        if "sequences" in vars(self):
            mapped.sequences = self.sequences._replace(table=function(self.sequences.table))
        return mapped


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device. The host waits for neither the copy nor what the device does before it."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _spans(doc_ids: Tensor) -> Tensor:
    """Return (row, start, stop) of each document, shape [D, 3], from `doc_ids` [R, T]."""
    edge = torch.full_like(doc_ids[:, :1], -1)  # [R, 1]
    real = doc_ids >= 0
    rows, starts = (real & (doc_ids != torch.cat([edge, doc_ids[:, :-1]], 1))).nonzero(as_tuple=True)  # [D], [D]
    _, lasts = (real & (doc_ids != torch.cat([doc_ids[:, 1:], edge], 1))).nonzero(as_tuple=True)  # [D]
    return torch.stack([rows, starts, lasts + 1], 1)


def _sequences(layout: Tensor, rows: int, columns: int) -> Sequences:
    """Return the sequences of R rows of T tokens, from `Batch.layout` [D, 3 or 5]."""
    row, start, stop = layout.T[:3]
    edges = [torch.arange(rows + 1) * columns, row * columns + start, row * columns + stop]
    edges = torch.cat(edges).unique()  # [S + 1]
    shared, prefix = torch.zeros(2, len(edges) - 1, dtype=torch.int64)  # [S] length and flat start of a shared prompt
    if layout.shape[1] == 5:
        sequence = torch.searchsorted(edges, row * columns + start)  # [D]
        shared[sequence], prefix[sequence] = layout[:, 4] - layout[:, 3], row * columns + layout[:, 3]
    n_queries = edges.diff()  # [S]
    n_keys = n_queries + shared  # [S]
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), n_keys.cumsum(0)])  # [S + 1]
    table = [edges, ends]
    if layout.shape[1] == 5:
        of = torch.arange(len(n_keys)).repeat_interleave(n_keys)  # [K] the sequence of each key
        step = torch.arange(len(of)) - ends[of]  # [K]
        table.append(torch.where(step < shared[of], prefix[of] + step, edges[of] + step - shared[of]))
    return Sequences(torch.cat(table).int(), len(n_keys), int(n_queries.max()), int(n_keys.max()))


@dataclass
class PolicyOutput:
    """The output of a policy: values of each target, or `scores` of each document.

    Attributes:
        logps: Log-probabilities of the targets, float32, shape [N]; None from a scalar head.
        doc_ids: Document of each target, int64, shape [N].
        n_docs: D.
        entropy: Entropy of the distribution at each target if requested, float32, shape [N].
        mean_logps: Mean log-probability over the vocabulary at each target if requested, float32, shape [N].
        log_sum_squares: Log of the sum of the squared probabilities at each target if requested, without gradient,
            float32, shape [N].
        values: Output of a value head before each target, float32, shape [N].
        scores: Output of a scalar head with L labels at the last token of each document, float32, shape [D, L].
        embeddings: Pooled hidden states of each document if requested, float32, shape [D, H].
        divergence: Divergence from the distribution of a teacher if requested, float32, shape [N].
        loss_sum: The loss that `detached_weight_fn` or the weights of `Distillation` describe, summed over the targets,
            float32, shape []. None if the LM head has not computed its gradient in the forward pass.
    """

    logps: Tensor | None  # [N]
    doc_ids: Tensor  # [N]
    n_docs: int
    entropy: Tensor | None = None  # [N]
    mean_logps: Tensor | None = None  # [N]
    log_sum_squares: Tensor | None = None  # [N]
    values: Tensor | None = None  # [N]
    scores: Tensor | None = None  # [D, L]
    embeddings: Tensor | None = None  # [D, H]
    divergence: Tensor | None = None  # [N]
    loss_sum: Tensor | None = None  # []

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
    documents = [document for row in rows for document in row]
    layout, shifts = _lay_out(rows, n_columns)
    starts, prefixes = layout[:, 0], layout[:, 1:3]
    lengths = torch.tensor([len(d.ids) - d.shared for d in documents], dtype=torch.int64)  # [D]
    doc_of = torch.arange(len(documents)).repeat_interleave(lengths)  # [M] document of each of the M tokens
    flat = torch.arange(len(doc_of)) + (starts - lengths.cumsum(0) + lengths).index_select(0, doc_of)  # [M] in [R * T]

    def spread(values: Tensor, empty: Tensor) -> Tensor:
        """Write values of the tokens, shape [M, ...], into a tensor of [R, T, ...], and return it."""
        empty.flatten(0, 1).index_copy_(0, flat, values)
        return empty

    def joined(name: Callable[[Document], Tensor], dtype: torch.dtype) -> Tensor:
        """Return values of the tokens, shape [M, ...]."""
        return torch.cat([name(d)[d.shared :] for d in documents]).to(dtype) if documents else flat.to(dtype)

    ids, mask = joined(lambda d: d.ids, torch.int64), joined(lambda d: d.mask, torch.bool)  # [M], [M]
    # Padding continues the positions: a restart would look like another document and need an attention mask.
    shift = spread(layout[:, 3].index_select(0, doc_of), shifts[:, None].repeat(1, n_columns))  # [R, T]
    columns = {
        name: spread(
            joined(lambda d, name=name: d.token_features[name], column.dtype),
            column.new_zeros(*shape, *column.shape[1:]),  # [R, T, ...]
        )
        for name, column in (documents[0].token_features if documents else {}).items()
    }
    values = {
        name: torch.tensor([document.doc_features[name] for document in documents])  # [D]
        for name in (documents[0].doc_features if documents else {})
    }
    return Batch(
        input_ids=spread(ids, torch.full(shape, pad_token_id)),
        position_ids=torch.arange(n_columns) + shift,
        labels=spread(torch.where(mask, ids, IGNORE_INDEX), torch.full(shape, IGNORE_INDEX)),
        doc_ids=spread(doc_of, torch.full(shape, -1)),
        n_docs=len(documents),
        prefixes=prefixes if prefixes.any() else None,
        doc_features=values,
        token_features=columns,
    )


def _lay_out(rows: list[list[Document]], n_columns: int) -> tuple[Tensor, Tensor]:
    """Return how documents lie in their rows.

    Returns:
        (flat position of the first token, start and stop of the shared prompt, position minus column) of each document,
        int64, shape [D, 4]; and position minus column in the padding of each row, shape [R].
    """
    layout, shifts = [], []
    for r, row in enumerate(rows):
        column = owner = shift = 0
        for document in row:
            shared = document.shared
            assert not shared or column > owner
            owner = owner if shared else column
            shift = shared - column
            layout.append((r * n_columns + column, *((owner, owner + shared) if shared else (0, 0)), shift))
            column += len(document.ids) - shared
        shifts.append(shift)
    return torch.tensor(layout, dtype=torch.int64).view(-1, 4), torch.tensor(shifts or [0])
