"""Documents -> Batch: rows padded on the right to the longest of them."""

import torch
from torch import Tensor

from ..batch import IGNORE, Batch

Document = tuple[Tensor, Tensor]  # ids [T] int32, mask [T] uint8


def collate(rows: list[list[Document]], pad_token_id: int) -> Batch:
    """Lays documents side by side in rows; without rows, one row of padding that has no labels."""
    n_columns = max((sum(len(ids) for ids, _ in row) for row in rows), default=2)
    shape = (max(1, len(rows)), n_columns)
    input_ids = torch.full(shape, pad_token_id)  # [R, T]
    labels = torch.full(shape, IGNORE)  # [R, T]
    doc_ids = torch.full(shape, -1)  # [R, T]
    # Padding continues the positions: a restart would look like one more document and cost an attention mask.
    position_ids = torch.arange(n_columns).repeat(shape[0], 1)  # [R, T]
    n_docs = 0
    for r, row in enumerate(rows):
        start = 0
        for ids, mask in row:
            span = slice(start, start + len(ids))
            input_ids[r, span] = ids.long()
            labels[r, span] = torch.where(mask.bool(), ids.long(), IGNORE)
            doc_ids[r, span] = n_docs
            position_ids[r, start:] = torch.arange(n_columns - start)
            n_docs += 1
            start += len(ids)
    return Batch(input_ids, position_ids, labels, doc_ids, n_docs)
