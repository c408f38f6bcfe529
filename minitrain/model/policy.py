"""The policy: a causal language model of transformers that returns logps of targets instead of logits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minitrain.batch import Batch, Distillation, PolicyOutput, to_device

from . import attention
from .decoder import decoder_of
from .flops import ModelFlops
from .kd_divergence import divergences
from .logprobs import LMHead, chunked_logprobs
from .offload import HostCopies
from .output_layer import measure_output
from .positions import n_positions, position_limit, rotary_limit
from .router import Routing

GROUPS_NOTE = "the model cannot separate documents of a row, so they run in groups of similar length"


class Policy(nn.Module):
    """A backbone with a chunked LM head, which runs only on the targets.

    The head runs inside `forward`, where a sharding wrapper has gathered its matrix.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training
        self.has_soft_prompt = hasattr(model, "soft_prompt")  # trained vectors come before each document
        self.value_head: nn.Linear | None = None
        self.routing: Routing | None = None  # of a mixture of experts in training
        self.output_form = measure_output(model) if model.get_output_embeddings() is not None else None
        self.flops: ModelFlops | None = None  # of training
        self.host_copies: HostCopies | None = None  # of the inputs of blocks
        self.compiles_head = False  # set to compile what the LM head computes between its matrix products
        self.groups_documents = False  # set for a model that cannot separate the documents of a row
        self.max_over_ranks: Callable[[int], float] = float

    def hidden_states(self, batch: Batch) -> Tensor:
        """Return the last hidden states, shape [R, T, H]."""
        return self._hidden_states_by_group(batch) if self.groups_documents else self._hidden_states_by_row(batch)

    def _hidden_states_by_group(self, batch: Batch) -> Tensor:
        """Run the backbone on groups of documents of similar length, with a padded row for each document.

        Recurrent states, convolutions and masks that know nothing of packing then cannot mix documents.
        """
        rows, columns = batch.input_ids.shape
        layout = batch.layout if batch.n_docs else torch.tensor([[0, 0, columns]])  # a batch of padding
        groups, inverse = attention.group_documents(layout, rows, columns, batch.input_ids.device)
        # All ranks of a sharded model must make the same number of calls, in the backward pass too.
        n_calls = int(self.max_over_ranks(len(groups)))
        parts = [batch.with_row_per_document(group.positions, group.lengths) for group in groups]
        outputs = [
            self._hidden_states_by_row(part).flatten(0, 1).index_select(0, group.valid)  # [tokens, H]
            for part, group in zip(parts, groups, strict=True)
        ]
        padding = batch.with_row_per_document(groups[-1].positions[:1], groups[-1].lengths[:1] * 0)
        for _ in range(len(groups), n_calls):
            outputs[-1] = outputs[-1] + self._hidden_states_by_row(padding)[:, :0].sum()
        return attention.scatter_documents(outputs, inverse, rows)

    def _hidden_states_by_row(self, batch: Batch) -> Tensor:
        """Run the backbone on all rows.

        Without a mask and a cache, transformers infers document boundaries from position_ids. `attention` receives them
        as the mask. Batch rows of one document each share their positions.
        """
        # In packed rows, positions that continue into the padding could exceed the model's position table.
        positions = batch.position_ids * (batch.doc_ids >= 0) if batch.packed else batch.position_ids[:1]
        positions = positions.expand(len(batch.input_ids), -1)  # [R, T]; Qwen 4 reads them of each row
        inputs, n_before = {"input_ids": batch.input_ids}, 0
        if self.has_soft_prompt:
            prompt = self.model.soft_prompt
            inputs = prompt(batch.input_ids, self.model.get_input_embeddings(), self.model.dtype)
            n_before = prompt.n_before
            first = torch.arange(n_before, device=positions.device).expand(len(positions), -1)  # [R, n]
            positions = torch.cat([first, positions + prompt.n_tokens], 1)
        decoder = decoder_of(self.model)
        if self.routing is not None:
            decoder = self.routing.through(decoder, batch, n_before)
        outputs = decoder(
            **inputs,
            **({"attention_mask": None} if self.has_soft_prompt else attention.document_inputs(self.model, batch)),
            position_ids=positions,
            use_cache=False,
            return_dict=True,
        )
        return outputs.last_hidden_state[:, n_before:]

    @property
    def n_positions(self) -> int:
        """Return the longest document, in tokens, that the config of the model names."""
        return n_positions(self.model) - self._n_prompt_tokens

    @property
    def position_limit(self) -> int:
        """Return the longest document, in tokens, that the model can read; a soft prompt does not count."""
        return position_limit(self.model) - self._n_prompt_tokens

    @property
    def rotary_limit(self) -> int:
        """Return the longest document, in tokens, whose output does not depend on the rest of its batch."""
        return rotary_limit(self.model) - self._n_prompt_tokens

    @property
    def _n_prompt_tokens(self) -> int:
        return self.model.soft_prompt.n_tokens if self.has_soft_prompt else 0

    @property
    def attention_is_quadratic_in_row(self) -> bool:
        """Return whether the cost of attention is quadratic in the length of a packed row."""
        return self.model.config._attn_implementation in ("eager", "sdpa")

    @property
    def supports_document_masking(self) -> bool:
        """Return whether attention masks by document, so that documents of a row can share a prompt."""
        return self.model.config._attn_implementation == attention.NAME

    def lm_head(self, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """Return the input of the LM head and the head, for hidden states [N, H].

        With LoRA on the head, both are widened (see `lora`), so the input is [N, H + r].
        """
        head, form = self.model.get_output_embeddings(), self.output_form
        for module in form.layers:
            hidden = module(hidden)
        rows, row_ids = getattr(head, "token_rows", None), getattr(head, "token_ids", None)
        layer = LMHead(head.weight, getattr(head, "bias", None), form.scale, form.softcap, rows, row_ids)
        if hasattr(head, "lora"):
            hidden, layer = head.as_output(hidden, layer)
        return hidden, layer if form.n_tokens is None else layer.first(form.n_tokens)

    def forward(
        self,
        batch: Batch,
        detached_weight_fn: Callable[[Tensor], Tensor] | None = None,
        entropy: bool = False,
        mean_logps: bool = False,
        temperature: float = 1.0,
        distillation: Distillation | None = None,
        log_sum_squares: bool = False,
        pooling: str | None = None,
    ) -> PolicyOutput:
        """Return the logps of the N targets of a batch, and the other requested values.

        Args:
            batch: R batch rows of T tokens.
            detached_weight_fn: See `logprobs.chunked_logprobs`.
            entropy: Also return the entropy at each target.
            mean_logps: Also return the mean log-probability over the vocabulary at each target.
            temperature: Divides the logits, as in sampling.
            distillation: Also return the divergence from this teacher. Logps are then at temperature 1, and the other
                options have no effect.
            log_sum_squares: Also return the log of the sum of the squared probabilities at each target.
            pooling: Return only the embeddings of the documents: the hidden states of their last tokens, or their
                `mean` over tokens.

        Returns:
            Float32 tensors of shape [N]. `values` is set if the policy has a value head.
        """
        if pooling is not None:
            return PolicyOutput(None, batch.target_docs, batch.n_docs, embeddings=self._pool(batch, pooling))
        hidden = self._select_hidden_states(batch)  # [N, H]
        values = self._compute_values(hidden) if self.value_head is not None else None
        hidden, layer = self.lm_head(hidden)
        if distillation is not None:
            found = divergences(hidden, batch.targets, layer, distillation, compile=self.compiles_head)
            outputs = dict(zip(("logps", "divergence", "loss_sum"), found, strict=True))
        else:
            options = detached_weight_fn, entropy, mean_logps, None, self.compiles_head, log_sum_squares
            outputs = chunked_logprobs(hidden, batch.targets, layer.at(temperature), *options)._asdict()
        return PolicyOutput(doc_ids=batch.target_docs, n_docs=batch.n_docs, values=values, **outputs)

    def _pool(self, batch: Batch, pooling: str) -> Tensor:
        """Return the hidden states of the documents' last tokens, or their means over tokens, shape [D, H], float32."""
        hidden = self.hidden_states(batch).flatten(0, 1).float()  # [R * T, H]
        if pooling == "last":
            return hidden.index_select(0, to_device(batch.last_token_positions, hidden.device))
        docs = batch.doc_ids.flatten() + 1  # [R * T] 0 at padding
        sums = hidden.new_zeros(1 + batch.n_docs, hidden.shape[1]).index_add(0, docs, hidden)  # [1 + D, H]
        counts = hidden.new_zeros(1 + batch.n_docs, 1).index_add(0, docs, torch.ones_like(hidden[:, :1]))
        return (sums / counts.clamp(min=1))[1:]

    def target_hidden_states(self, batch: Batch) -> tuple[Tensor, LMHead]:
        """Return the input of the LM head at the N targets, shape [N, H], and the head."""
        return self.lm_head(self._select_hidden_states(batch))

    def _select_hidden_states(self, batch: Batch) -> Tensor:
        """Return the hidden states that predict the N targets, shape [N, H]."""
        return self.hidden_states(batch).flatten(0, 1).index_select(0, batch.predict_positions)

    def add_value_head(self) -> None:
        """Add a linear layer that maps each hidden state to one value, 0 at first."""
        self.value_head = nn.Linear(self.model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def _compute_values(self, hidden: Tensor) -> Tensor:
        """Return the value of each hidden state [N, H], shape [N], float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float())[:, 0]
