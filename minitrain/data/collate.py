"""Documents -> Batch: rows padded on the right to the longest of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from minitrain.batch import IGNORE_INDEX, Batch


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
