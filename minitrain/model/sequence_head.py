"""Policies with a scalar head instead of an LM head: reward models, value models and classifiers."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitrain.batch import Batch, PolicyOutput, to_device
from minitrain.errors import ConfigError

from .decoder import find_blocks
from .policy import Policy
from .positions import UNLIMITED, n_positions

MULTI_LABEL = "multi_label_classification"  # transformers' problem_type of outputs that are each a yes or no


class Heads(NamedTuple):
    """Names of the modules of a scalar head.

    Attributes:
        trained: All modules of the head; they are trained in full.
        new: Modules whose weights are missing in the files.
    """

    trained: list[str]
    new: list[str]


class Scorer(Policy):
    """A decoder with a linear layer on the hidden state of each document's last token.

    It selects the last token by its position in the batch row, not by the pad token.
    """

    def forward(self, batch: Batch, at_targets: bool = False) -> PolicyOutput:
        """Return the `scores` [D, L] of the documents, and the `values` [N] before each target if L is 1.

        Args:
            at_targets: Return the values at the targets instead of before them.
        """
        hidden = self.hidden_states(batch).flatten(0, 1)  # [R * T, H]
        scores = self._scalars(hidden.index_select(0, to_device(batch.last_token_positions, hidden.device)))  # [D, L]
        values = None
        if scores.shape[1] == 1:
            positions = batch.target_positions if at_targets else batch.predict_positions  # [N]
            values = self._scalars(hidden.index_select(0, positions))[:, 0]  # [N]
        return PolicyOutput(None, batch.target_docs, batch.n_docs, values=values, scores=scores)

    @property
    def n_positions(self) -> int:
        """Return the longest document, in tokens, that the model's config allows."""
        return n_positions(self.model)

    def _scalars(self, hidden: Tensor) -> Tensor:
        """Return the head's outputs for hidden states [n, H], shape [n, L], float32."""
        head = self.model.score
        with torch.autocast(hidden.device.type, enabled=False):
            bias = head.bias.float() if head.bias is not None else None
            return F.linear(hidden.float(), head.weight.float(), bias)


class EncoderScorer(Policy):
    """An encoder such as BERT with the head of transformers; one document per batch row, padded on the right.

    Attributes:
        ignores_padding: The scores of a document do not depend on the padding of its batch, so that documents of
            different lengths are computed together. `check_policy` sets it.
    """

    ignores_padding = True

    def forward(self, batch: Batch, at_targets: bool = False) -> PolicyOutput:
        """Return the `scores` [D, L] of the documents; an encoder has no values."""
        mask = batch.doc_ids >= 0  # [R, T]
        mask = mask | ~mask.any(1, keepdim=True)  # a row without a document must not give NaN
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask.long()}
        if getattr(self.model.config, "type_vocab_size", 1) > 1 and "token_types" in batch.token_features:
            inputs["token_type_ids"] = batch.token_features["token_types"].long()
        if self.ignores_padding or batch.n_docs == 0:
            scores = self.model(**inputs).logits[: batch.n_docs].float()  # [D, L]
        else:
            scores = self._scores_by_length(inputs, batch.spans[:, 2])
        return PolicyOutput(None, batch.target_docs, batch.n_docs, scores=scores)

    def _scores_by_length(self, inputs: dict[str, Tensor], lengths: Tensor) -> Tensor:
        """Return the scores [D, L] of documents of these lengths [D], those of equal length together."""
        distinct, counts = lengths.unique(return_counts=True)
        order = lengths.argsort(stable=True)  # [D]
        scores = [
            self.model(
                **{name: tensor[to_device(rows, tensor.device), : int(length)] for name, tensor in inputs.items()}
            ).logits
            for length, rows in zip(distinct, order.split(counts.tolist()), strict=True)
        ]
        return torch.cat(scores).float()[to_device(order.argsort(), scores[0].device)]

    @property
    def n_positions(self) -> int:
        """Return the longest document, in tokens; RoBERTa's positions begin after the pad token id."""
        for name, module in self.model.base_model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
                return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        return UNLIMITED

    @property
    def position_limit(self) -> int:
        return self.n_positions


def make_policy(model: nn.Module) -> Policy:
    """Wrap a model in the policy for its head."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(_match_weight_dtype)
    if model.get_output_embeddings() is not None:
        return Policy(model)
    return EncoderScorer(model) if is_encoder(model) else Scorer(model)


def _match_weight_dtype(norm: nn.LayerNorm, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast the input to the dtype of the weight, which autocast does not do for layer_norm on the CPU."""
    (x,) = inputs
    needs_cast = x.dtype == torch.float32 and x.device.type == "cpu" and norm.weight is not None
    return (x.to(norm.weight.dtype),) if needs_cast else inputs


def is_encoder(model: nn.Module) -> bool:
    """Return whether a model is an encoder such as BERT; transformers names the scalar head of decoders `score`."""
    return model.get_output_embeddings() is None and not hasattr(model, "score")


def check_can_pack(model: nn.Module, packing: bool) -> None:
    """Check that a model is not an encoder if `packing` is set.

    Raises:
        ConfigError: The model is an encoder and `packing` is set.
    """
    if packing and is_encoder(model):
        reason = "an encoder attends to all of a batch row. Set packing=false (group_by_length saves padding)."
        raise ConfigError(f"packing: {reason}", "conflict")


def check_embedding(model: nn.Module) -> None:
    """Reject models without an embedding of tokens, such as CANINE and Perceiver. Raises ConfigError."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    if not isinstance(embedding, nn.Module):
        raise ConfigError(
            f"model.name_or_path: {type(model).__name__} has no embedding with a row for each token, "
            "so it is not supported. Choose another model.",
            "unsupported-model",
        )


def name_outputs(model: nn.Module, outputs: list[str], pad_token_id: int, missing: Iterable[str]) -> None:
    """Set the labels and the pad token id in a model's config, and set `model.heads`.

    Args:
        model: A model with a scalar head.
        outputs: Labels of the head.
        pad_token_id: The tokenizer's pad token id; transformers uses it to find the last token of a document.
        missing: Names of the parameters that are missing in the model's files.

    Raises:
        ConfigError: More than a head is missing, or the files have the same labels in another order.
    """
    config, labels = model.config, list(model.config.id2label.values())
    if labels != outputs and sorted(labels) == sorted(outputs):
        reason = f"the model has the same labels in another order. Set loss.labels=[{','.join(labels)}]"
        raise ConfigError(f"loss.labels: {reason}.", "mismatch")
    config.id2label = dict(enumerate(outputs))
    config.label2id = {name: number for number, name in enumerate(outputs)}
    if len(outputs) == 1 or config.problem_type != MULTI_LABEL:
        config.problem_type = "regression" if len(outputs) == 1 else "single_label_classification"
    check_embedding(model)
    text_config = config.get_text_config()
    if not is_encoder(model) or text_config.pad_token_id is None:  # RoBERTa counts positions from its own pad token id
        text_config.pad_token_id = config.pad_token_id = pad_token_id
    new = sorted({name.rpartition(".")[0] for name in missing})
    body = set(find_blocks(model).modules()) | {model.get_input_embeddings()}
    if missing_modules := [name for name in new if model.get_submodule(name) in body]:
        raise ConfigError(
            f"model.name_or_path: weights are missing in its files: {missing_modules[0]} and "
            f"{len(missing_modules) - 1} others. Copy or download it again.",
            "damaged-file",
        )
    children = {name for name, child in model.named_children() if any(True for _ in child.parameters())}
    head = sorted(children - {model.base_model_prefix})
    model.heads = Heads(head + [name for name in new if name.partition(".")[0] not in head], new)


def set_problem_type(model: nn.Module, multi_label: bool) -> None:
    """Set whether each of several outputs is a yes or no by itself, in the files of the model or its adapter."""
    model.config.problem_type = MULTI_LABEL if multi_label else "single_label_classification"
    if hasattr(model, "adapter"):
        model.adapter.config["minitrain_problem_type"] = model.config.problem_type


def heads_of(model: nn.Module) -> Heads:
    """Return the head modules of a loaded model; empty for a causal LM."""
    return Heads([], []) if model.get_output_embeddings() is not None else model.heads
