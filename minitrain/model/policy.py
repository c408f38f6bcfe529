"""The policy: a transformers causal language model that gives per-token scores instead of logits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..batch import IGNORE, Batch, Scores
from ..errors import ConfigError
from .heads import OutputLayer, token_scores


class Policy(nn.Module):
    """Backbone, then the chunked head on the supervised positions only.

    The head runs inside `forward`, so that a sharding wrapper has gathered its matrix when it is needed.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        config = model.config
        # Cohere multiplies its logits, Granite divides them; Gemma 2 caps them.
        self.scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last hidden states -> [R, T, H].

        No attention mask and no cache: then transformers reads the borders of documents off position_ids.
        """
        outputs = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, return_dict=True
        )
        return outputs.last_hidden_state

    def output_layer(self) -> OutputLayer:
        head = self.model.get_output_embeddings()
        return OutputLayer(head.weight, getattr(head, "bias", None), self.scale, self.softcap)

    def forward(
        self,
        batch: Batch,
        token_weights: Callable[[Tensor], Tensor] | None = None,
        entropy: bool = False,
        mean_logps: bool = False,
    ) -> Scores:
        """Scores of the N supervised tokens of a batch; see `heads.token_scores` for the options."""
        hidden = self.hidden_states(batch).flatten(0, 1).index_select(0, batch.predictors)  # [N, H]
        scores = token_scores(hidden, batch.targets, self.output_layer(), token_weights, entropy, mean_logps)
        return Scores(scores.logps, batch.target_docs, batch.n_docs, scores.entropy, scores.mean_logps)


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks: the longest ModuleList that is no part of another one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    inner = {id(sub) for outer in lists for sub in outer.modules() if sub is not outer}
    outermost = [module for module in lists if id(module) not in inner]
    if not outermost:
        raise ConfigError(f"{type(model).__name__} has no list of blocks that minitrain can find")
    return max(outermost, key=len)


@torch.no_grad()
def check_policy(policy: Policy, packing: bool) -> None:
    """Tries what minitrain relies on, on a handful of tokens, since not every architecture keeps to it.

    Raises ConfigError when the chunked head gives other log-probabilities than the model's own logits, or,
    with `packing`, when documents of one row see each other.
    """
    training, model = policy.training, policy.model
    policy.eval()
    device = next(policy.parameters()).device
    ids = torch.arange(3, 15, device=device) % model.config.get_text_config().vocab_size  # [12]
    alone = [_document(ids[:7]), _document(ids[7:])]
    logps = [policy(document).logps for document in alone]
    logits = model(input_ids=alone[0].input_ids, use_cache=False).logits[0, :-1].float()  # [6, V]
    plain = logits.log_softmax(-1).gather(1, ids[1:7, None])[:, 0]  # [6]
    tolerance = 1e-3 if logits.dtype == torch.float32 else 5e-2
    if not torch.allclose(plain, logps[0], rtol=tolerance, atol=tolerance):
        raise ConfigError(
            f"model.name_or_path: the output layer of {type(model).__name__} does something that minitrain does not "
            "know, so its log-probabilities would be wrong. Please report this architecture."
        )
    if packing:
        packed = policy(_pack(*alone)).logps  # [10]
        if not torch.allclose(packed, torch.cat(logps), rtol=tolerance, atol=tolerance):
            raise ConfigError(
                f"packing: {type(model).__name__} lets documents of one row see each other; set packing=false "
                "(group_by_length=true also saves padding)."
            )
    policy.train(training)


def _document(ids: Tensor) -> Batch:
    labels = ids.clone()
    labels[0] = IGNORE
    row = [t[None] for t in (ids, torch.arange(len(ids), device=ids.device), labels, torch.zeros_like(ids))]
    return Batch(*row, n_docs=1)


def _pack(first: Batch, second: Batch) -> Batch:
    def join(name: str, offset: int = 0) -> Tensor:
        return torch.cat([getattr(first, name), getattr(second, name) + offset], dim=1)

    return Batch(join("input_ids"), join("position_ids"), join("labels"), join("doc_ids", 1), n_docs=2)
