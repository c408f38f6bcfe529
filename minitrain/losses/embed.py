"""Embeddings and rerankers, trained on queries with a text that answers each and texts that do not."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minitrain.batch import Batch
from minitrain.config.schema import option

from .base import Loss, LossOutput, Models, register_loss
from .full_step import FullStepLoss, RowLosses

QUERY, POSITIVE = 0, 1  # the doc feature `role`; negatives have 2


@dataclass
class EmbedOptions:
    temperature: float = option(0.05, "Divides the cosine similarities.", gt=0, le=100)
    pooling: str = option("last", "The last token's hidden state, or the mean over tokens.", choices=("last", "mean"))


@register_loss("embed", EmbedOptions)
class Embed(FullStepLoss):
    """``-log exp(cos(q, p) / T) / sum exp(cos(q, c) / T)``, InfoNCE (arXiv 1807.03748); the unit is the query.

    p is the positive of the query q. The candidates c are the positives and negatives of all queries of the optimizer
    step, over all micro-batches and ranks, without those that have the text of p, or are positives of the same query.
    """

    example_type = "retrieval"

    def model_files(self, hidden_size: int) -> dict[str, Any]:
        """Return what sentence-transformers reads: the pooling, and that embeddings are normalized."""
        modes = {"lasttoken": self.options.pooling == "last", "mean_tokens": self.options.pooling == "mean"}
        modes |= dict.fromkeys(("cls_token", "max_tokens"), False)
        pooling = {"word_embedding_dimension": hidden_size} | {f"pooling_mode_{k}": on for k, on in modes.items()}
        parts = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(parts.items())
        ]
        return {"modules.json": modules, "1_Pooling/config.json": pooling}

    def num_items(self, batch: Batch) -> Tensor:
        return (batch.doc_feature("role") == QUERY).sum().float()

    def step_rows(self, batch: Batch, models: Models) -> tuple[Tensor, Tensor]:
        """Return the normalized embeddings [D, H], and the role, text and query of each document [D, 3]."""
        states = F.normalize(models.policy(batch, pooling=self.options.pooling).embeddings, dim=1)
        return states, torch.stack([batch.doc_feature(name) for name in ("role", "text", "query")], 1)

    def row_losses(self, rows: Tensor, numbers: Tensor) -> RowLosses:
        role, text, query = numbers.T  # [D] each
        queries, candidates = (role == QUERY).nonzero()[:, 0], (role != QUERY).nonzero()[:, 0]  # [Q], [C]
        with torch.autocast(rows.device.type, enabled=False):
            similarities = rows[queries] @ rows[candidates].T  # [Q, C]
        own = torch.searchsorted(candidates, queries + 1)  # [Q] index of the positive, which follows the query
        positive = candidates[own]  # [Q]
        same = text[candidates] == text[positive][:, None]  # [Q, C]
        same |= (role[candidates] == POSITIVE) & (query[candidates] == query[queries][:, None])
        same[torch.arange(len(own), device=own.device), own] = False
        similarities = similarities.masked_fill(same, -torch.inf)
        losses = F.cross_entropy(similarities / self.options.temperature, own, reduction="none")  # [Q]
        with torch.no_grad():
            ranks = 1 + (similarities > similarities.gather(1, own[:, None])).sum(1)  # [Q] of the positive
            metrics = {"accuracy": (ranks == 1).float(), "mrr": 1 / ranks}
        zeros = rows.new_zeros(len(rows))  # [D]
        spread = {name: zeros.index_copy(0, queries, values.to(zeros.dtype)) for name, values in metrics.items()}
        return RowLosses(zeros.index_copy(0, queries, losses), spread)

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        rows, numbers = self.step_rows(batch, models)
        losses, metrics = self.losses_of(rows, numbers)
        n = self.num_items(batch)
        return LossOutput(losses.sum() + 0 * rows.sum(), n, {name: (x.sum(), n) for name, x in metrics.items()})


@dataclass
class RerankOptions:
    temperature: float = option(1.0, "Divides the scores.", gt=0, le=100)


@register_loss("rerank", RerankOptions)
class Rerank(Loss):
    """``-log softmax(s / T)`` at the positive, over a query's scores with each of its texts; the unit is the query.

    The model reads the query and a text together. Gao et al. 2021 (arXiv 2101.08751).
    """

    example_type = "ranking"

    @property
    def head_labels(self) -> list[str]:
        return ["score"]

    def num_items(self, batch: Batch) -> Tensor:
        return (batch.doc_feature("role") == POSITIVE).sum().float()

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        scores, n = models.policy(batch).scores[:, 0], self.num_items(batch)  # [D], []
        is_first = batch.doc_feature("role") == POSITIVE  # [D] the positive comes first
        group, first = is_first.cumsum(0) - 1, is_first.nonzero()[:, 0]  # [D], [Q]
        logits = scores / self.options.temperature  # [D]
        top = (
            logits.detach().new_full((len(first),), -torch.inf).scatter_reduce(0, group, logits.detach(), "amax")
        )  # [Q]
        total = torch.zeros_like(top).index_add(0, group, (logits - top[group]).exp())  # [Q]
        losses = top + total.log() - logits[first]  # [Q]
        with torch.no_grad():
            above = torch.zeros_like(top).index_add(0, group, (scores > scores[first][group]).to(top.dtype))  # [Q]
            metrics = {"accuracy": ((above == 0).float().sum(), n), "mrr": ((1 / (1 + above)).sum(), n)}
        return LossOutput(losses.sum() + 0 * scores.sum(), n, metrics)
