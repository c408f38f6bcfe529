"""Policies that end in scalars and not in a vocabulary: reward and value models, classifiers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch, Scores
from ..errors import ConfigError
from .policy import Policy, check_packing, row_of


class Scorer(Policy):
    """A decoder with a linear layer on the hidden state of each document's last token.

    That is where a document ends in its row, wherever padding is and whatever ids stand in the text.
    """

    def forward(self, batch: Batch) -> Scores:
        """`scores` [D, L] of the documents, and where L is 1 `values` [N] of the text before each supervised token."""
        hidden = self.hidden_states(batch).flatten(0, 1)  # [R * T, H]
        scores = self._scalars(hidden.index_select(0, batch.last_places.to(hidden.device)))  # [D, L]
        values = None
        if scores.shape[1] == 1:
            values = self._scalars(hidden.index_select(0, batch.predictors))[:, 0]  # [N]
        return Scores(None, batch.target_docs, batch.n_docs, values=values, scores=scores)

    def _scalars(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, L] float32."""
        head = self.model.score
        with torch.autocast(hidden.device.type, enabled=False):
            bias = head.bias.float() if head.bias is not None else None
            return F.linear(hidden.float(), head.weight.float(), bias)

    def check(self, ids: Tensor, packing: bool, gathered) -> None:
        pad = self.model.config.get_text_config().pad_token_id
        _check_scores(self, ids[ids != pad], gathered)
        if packing:
            check_packing(self, ids)

    def score_of_second(self, scores: Scores) -> Tensor:
        return scores.scores[1].sum()


class EncoderScorer(Policy):
    """An encoder of BERT's kind with the head that transformers gives it; one document a row."""

    def forward(self, batch: Batch) -> Scores:
        """`scores` [D, L] of the documents."""
        mask = batch.doc_ids >= 0  # [R, T]
        mask = mask | ~mask.any(1, keepdim=True)  # a row without a document must not come to NaN
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask.long()}
        if getattr(self.model.config, "type_vocab_size", 1) > 1 and "token_types" in batch.columns:
            inputs["token_type_ids"] = batch.columns["token_types"].long()
        scores = self.model(**inputs).logits[: batch.n_docs].float()  # [D, L]
        return Scores(None, batch.target_docs, batch.n_docs, scores=scores)

    def check(self, ids: Tensor, packing: bool, gathered) -> None:
        if packing:
            told = "an encoder sees all of a row; set packing=false (group_by_length saves padding)."
            raise ConfigError(f"packing: {told}")


def make_policy(model: nn.Module) -> Policy:
    """The policy that fits how a model ends."""
    if model.get_output_embeddings() is not None:
        return Policy(model)
    return Scorer(model) if hasattr(model, "score") else EncoderScorer(model)


def head_name(model: nn.Module) -> str | None:
    """The module with the scalar head; None for a model that ends in a vocabulary."""
    if model.get_output_embeddings() is not None:
        return None
    return next(name for name in ("score", "classifier") if hasattr(model, name))


@torch.no_grad()
def _check_scores(policy: Scorer, ids: Tensor, gathered) -> None:
    prompted, policy.prompted = policy.prompted, False  # the model's own logits know of no prompt
    ours = policy(row_of(ids, [len(ids)])).scores[0]  # [L]
    policy.prompted = prompted
    with gathered():
        theirs = policy.model(input_ids=ids[None], use_cache=False).logits[0].float()  # [L]
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 + float(theirs.abs().max()) / 64):
        raise ConfigError(
            f"model.name_or_path: the head of {type(policy.model).__name__} does something that minitrain does not "
            "know, so its scores would be wrong. Please report this architecture."
        )
