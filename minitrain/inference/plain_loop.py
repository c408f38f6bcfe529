"""Sample responses with `model.generate` of transformers, for models whose cache is not plain keys and values.

A batch has prompts of one length, so nothing is padded. Rows that end stay in the batch until all have ended.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from minitrain.model.decoder import decoder_of
from minitrain.model.policy import Policy
from minitrain.model.positions import batches_by_length

from .choice import Row, TokenChoice


class PlainLoop:
    """Samples tokens with `model.generate`, which only advances the model: the tokens are chosen here.

    Args:
        policy: The policy, in eval mode.
        n_slots: Maximum number of rows of a batch.
        own_logits: Use the logits of the model instead of those of the policy.
    """

    def __init__(self, policy: Policy, n_slots: int, own_logits: bool = False):
        self.policy, self.model, self.n_slots, self.own_logits = policy, policy.model, n_slots, own_logits

    def run(self, rows: Sequence[Row], choice: TokenChoice) -> None:
        """Sample all tokens of rows."""
        for indices in batches_by_length([len(row.prompt) for row in rows], self.n_slots, limit=0):
            self._run_batch([rows[i] for i in indices], choice)

    def _run_batch(self, rows: list[Row], choice: TokenChoice) -> None:
        """Sample all tokens of rows whose prompts have the same length."""
        from transformers import GenerationConfig

        device, states = self.model.get_input_embeddings().weight.device, []

        def choose(_: Tensor, logits: Tensor) -> Tensor:
            """Return logits [B, V] that leave only the chosen token."""
            if self.own_logits or not states:
                ids, _ = choice.from_logits(logits.float(), rows)
            else:
                ids, _ = choice.from_states(states.pop()[:, -1], rows)
            states.clear()
            return torch.full_like(logits, -torch.inf).scatter(1, ids[:, None], 0.0)

        def are_done(ids: Tensor, _: Tensor) -> Tensor:
            return torch.tensor([row.done for row in rows], device=ids.device)  # [B]

        options = GenerationConfig(
            max_new_tokens=max(row.limit for row in rows), do_sample=False, use_cache=True, pad_token_id=0
        )
        hook = decoder_of(self.model).register_forward_hook(lambda _, __, output: states.append(output[0]))
        try:
            with _without_defaults(self.model):
                self.model.generate(
                    **self._inputs(torch.tensor([row.prompt for row in rows], device=device)),
                    generation_config=options,
                    logits_processor=[choose],
                    stopping_criteria=[are_done],
                )
        finally:
            hook.remove()

    def _inputs(self, ids: Tensor) -> dict:
        """Return the inputs of `model.generate` for prompts [B, T]."""
        if not self.policy.has_soft_prompt:
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        prompt = self.model.soft_prompt
        inputs = prompt(ids, self.model.get_input_embeddings(), self.model.dtype, fixed=False)
        inputs["attention_mask"] = ids.new_ones(len(ids), prompt.n_tokens + ids.shape[1])
        if prompt.method == "prefix":  # `generate` drops as many ids as the cache holds
            inputs["input_ids"] = torch.cat([ids.new_zeros(len(ids), prompt.n_tokens), ids], 1)
        return inputs


@contextlib.contextmanager
def _without_defaults(model: nn.Module) -> Iterator[None]:
    """Make `model.generate` ignore the model's generation_config.json.

    transformers takes from it every option that a call omits, such as a repetition penalty, even for greedy decoding.
    """
    defaults = model.generation_config
    model.generation_config = type(defaults)()
    try:
        yield
    finally:
        model.generation_config = defaults
