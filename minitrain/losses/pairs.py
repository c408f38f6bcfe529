"""What losses have in common whose examples are two documents."""

from torch import Tensor

from minitrain.batch import Batch

from .base import Loss


class PairLoss(Loss):
    """A loss whose unit is the pair: documents 2i and 2i + 1, of which both have something to learn."""

    def weight(self, batch: Batch) -> Tensor:
        return valid_pairs(batch).sum().float()


def valid_pairs(batch: Batch) -> Tensor:
    """Pairs of which both answers have something to learn -> [P] bool."""
    return batch.docs_with_targets.view(-1, 2).all(1)
