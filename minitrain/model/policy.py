"""The policy: a transformers causal language model that gives per-token scores instead of logits."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitrain.batch import IGNORE_INDEX, Batch, Distillation, PolicyOutput
from minitrain.errors import ConfigError

from . import attention, token_rows
from .diagnostics import first_line
from .kd_divergence import divergences
from .logprobs import LMHead, chunked_logprobs
from .positions import position_limit, rotary_limit


class Policy(nn.Module):
    """Backbone, then the chunked head on the supervised positions only.

    The head runs inside `forward`, so that a sharding wrapper has gathered its matrix when it is needed.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.training = model.training
        self.prompted = hasattr(model, "soft_prompt")  # whether trained vectors come before each document
        self.value_head: nn.Linear | None = None
        config = model.config
        # Cohere multiplies its logits, Granite divides them; Gemma 2 caps them.
        self.scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The last hidden states -> [R, T, H].

        Without a mask and a cache, transformers reads the borders of documents off position_ids; our own
        attention gets them in the mask's place. Rows of one document each have the same positions.
        """
        by_document = batch.packed and self.supports_document_masking
        # In packed rows, padding that continues the positions could go beyond those that the model has places for.
        positions = batch.position_ids * (batch.doc_ids >= 0) if batch.packed else batch.position_ids[:1]
        inputs, n_before = {"input_ids": batch.input_ids}, 0
        if self.prompted:
            prompt = self.model.soft_prompt
            inputs = prompt(batch.input_ids, self.model.get_input_embeddings(), self.model.dtype)
            n_before = prompt.n_before
            first = torch.arange(n_before, device=positions.device)[None]  # [1, n]
            positions = torch.cat([first, positions + prompt.n_tokens], 1)
        outputs = self.model.base_model(
            **inputs,
            attention_mask=attention.as_mask(batch.layout) if by_document else None,
            position_ids=positions,
            use_cache=False,
            return_dict=True,
        )
        return outputs.last_hidden_state[:, n_before:]

    @property
    def position_limit(self) -> int:
        """The longest text that the model can read, trained vectors before it not counted."""
        return position_limit(self.model) - self._n_prompt_tokens

    @property
    def rotary_limit(self) -> int:
        """The longest text that the model reads alike in every batch, trained vectors before it not counted."""
        return rotary_limit(self.model) - self._n_prompt_tokens

    @property
    def _n_prompt_tokens(self) -> int:
        return self.model.soft_prompt.n_tokens if self.prompted else 0

    @property
    def attention_is_quadratic_in_row(self) -> bool:
        """Whether attention over a packed row costs the square of the row's length."""
        return self.model.config._attn_implementation in ("eager", "sdpa")

    @property
    def supports_document_masking(self) -> bool:
        """Whether attention goes by documents, so that these may share a prompt in a row."""
        return self.model.config._attn_implementation == attention.NAME

    def output(self, hidden: Tensor) -> tuple[Tensor, LMHead]:
        """What goes into the output layer, and the layer; hidden is [N, H]."""
        head = self.model.get_output_embeddings()
        layer = LMHead(head.weight, getattr(head, "bias", None), self.scale, self.softcap)
        if token_rows.has_rows(head):
            layer = layer._replace(rows=head.token_rows, row_ids=head.token_ids)
        return head.as_output(hidden, layer) if hasattr(head, "lora") else (hidden, layer)

    def forward(
        self,
        batch: Batch,
        token_weights: Callable[[Tensor], Tensor] | None = None,
        entropy: bool = False,
        mean_logps: bool = False,
        temperature: float = 1.0,
        distillation: Distillation | None = None,
    ) -> PolicyOutput:
        """Scores of the N supervised tokens of a batch; see `heads.chunked_logprobs` for the options.

        `temperature` divides the logits, as when answers are sampled at it. With `distillation` the divergence from a
        teacher, beside log-probabilities at temperature 1 and in the place of the rest.
        """
        hidden = self._predicting(batch)  # [N, H]
        values = self._values(hidden) if self.value_head is not None else None
        hidden, layer = self.output(hidden)
        if distillation is not None:
            logps, divergence = divergences(hidden, batch.targets, layer, distillation)
            return PolicyOutput(logps, batch.target_docs, batch.n_docs, values=values, divergence=divergence)
        scores = chunked_logprobs(hidden, batch.targets, layer.at(temperature), token_weights, entropy, mean_logps)
        return PolicyOutput(scores.logps, batch.target_docs, batch.n_docs, scores.entropy, scores.mean_logps, values)

    def states(self, batch: Batch) -> tuple[Tensor, LMHead]:
        """What the distributions at the N supervised tokens are made of: hidden states [N, H], and the output layer."""
        return self.output(self._predicting(batch))

    def _predicting(self, batch: Batch) -> Tensor:
        """The hidden states that the N supervised tokens are predicted from -> [N, H]."""
        return self.hidden_states(batch).flatten(0, 1).index_select(0, batch.predict_positions)

    def add_value_head(self) -> None:
        """A scalar of each hidden state, 0 at first."""
        self.value_head = nn.Linear(self.model.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def _values(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N] float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.float())[:, 0]

    def check(self, ids: Tensor, packing: bool, gathered: Callable[[], AbstractContextManager]) -> None:
        """Compares the head with the model's own on a few tokens [n]; see `check_policy`."""
        _check_head(self, ids, gathered)
        if packing:
            check_packing(self, ids)

    def score_of_second(self, scores: PolicyOutput) -> Tensor:
        """Something that depends on the second document -> []."""
        return scores.per_document(scores.logps)[1]


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks: the longest ModuleList that is no part of another one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    inner = {id(sub) for outer in lists for sub in outer.modules() if sub is not outer}
    outermost = [module for module in lists if id(module) not in inner]
    if not outermost:
        raise ConfigError(f"{type(model).__name__} has no list of blocks that minitrain can find")
    return max(outermost, key=len)


def checkpoint_activations(model: nn.Module) -> None:
    """Each block keeps its input only and computes the rest again in the backward pass (non-reentrant)."""
    for block in find_blocks(model.base_model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def check_policy(
    policy: Policy,
    packing: bool,
    device: torch.device | str = "cpu",
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Tries what minitrain relies on, on a handful of tokens, since not every architecture keeps to it.

    Raises ConfigError when the policy's own head gives other numbers than the model's, or, with `packing`, when
    documents of one row see each other. `gathered` lets parts of a sharded policy be called.
    """
    training = policy.training
    policy.eval()
    ids = torch.arange(3, 15, device=device) % policy.model.config.get_text_config().vocab_size  # [12]
    policy.check(ids, packing, gathered)
    policy.train(training)


LARGE_LOGIT = 30.0  # large enough to see a softcap, a scale or a multiplier


def _check_head(policy: Policy, ids: Tensor, gathered: Callable[[], AbstractContextManager]) -> None:
    """Compare log-probabilities as they are, and on hidden states scaled so that the largest logit is `LARGE_LOGIT`.

    New models, above all, have logits so small that what an output layer does to them could not be told from rounding.
    """
    largest = _compare_logps(policy, ids, gathered, 1.0)
    if largest > 0:
        _compare_logps(policy, ids, gathered, LARGE_LOGIT / largest)


@torch.no_grad()
def _compare_logps(policy: Policy, ids: Tensor, gathered: Callable[[], AbstractContextManager], scale: float) -> float:
    """Compare the policy with its model on the last hidden states times `scale`; return the model's largest logit."""
    prompted, policy.prompted = policy.prompted, False  # the model's own logits know of no prompt
    with _scaled_states(policy.model, scale) as calls:
        ours = policy(row_of(ids, [12])).logps  # [11]
        policy.prompted = prompted
        with gathered():
            logits = policy.model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # [11, V]
    if len(calls) != 2:
        return 0.0  # its parts are called in a way that cannot be scaled
    if not logits.isfinite().all():
        raise ConfigError(
            "model.name_or_path: the model gives NaN or inf, so its weights are damaged, or too large for policy_dtype."
        )
    plain = logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]  # [11]
    largest = float(logits.abs().max())
    tolerance = 1e-3 if logits.dtype == torch.float32 else 1e-2 + largest / 64
    relative = tolerance if scale == 1.0 else min(tolerance, 1e-2)
    if not torch.allclose(plain, ours, rtol=relative, atol=tolerance):
        raise ConfigError(
            f"model.name_or_path: the output layer of {type(policy.model).__name__} does something that minitrain "
            "does not know, so its log-probabilities would be wrong. Please report this architecture."
        )
    return largest


@contextmanager
def _scaled_states(model: nn.Module, scale: float) -> Iterator[list]:
    """Inside, a model without its output layer gives its last hidden states times `scale`; yields its calls.

    Some models, like OPT, call their decoder without its parent.
    """
    calls, body = [], model.get_decoder()

    def scaled(module, inputs, outputs):
        calls.append(module)
        outputs.last_hidden_state = outputs.last_hidden_state * scale
        return outputs

    hook = (model.base_model if body in (None, model) else body).register_forward_hook(scaled)
    try:
        yield calls
    finally:
        hook.remove()


def check_packing(policy: Policy, ids: Tensor) -> None:
    """The second document's score must not depend on the first one's embeddings at all. Raises ConfigError."""
    seen = []
    embedding = policy.model.get_input_embeddings()

    def note(module, args, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())  # [1, 12, H]
        return seen[-1].clone()  # which a model may change in place

    hook = embedding.register_forward_hook(note)
    try:
        with torch.enable_grad():
            score = policy.score_of_second(policy(row_of(ids, [5, len(ids) - 5])))  # []
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        name, reason = type(policy.model).__name__, first_line(error)
        raise ConfigError(f"packing: {name} cannot read packed rows ({reason}). Set packing=false.") from None
    finally:
        hook.remove()
    gradient = torch.autograd.grad(score, seen[0])[0]  # [1, 12, H]
    if gradient[0, :5].any():
        raise ConfigError(
            f"packing: {type(policy.model).__name__} lets documents of one row see each other; set packing=false "
            "(group_by_length=true also saves padding)."
        )


def row_of(ids: Tensor, lengths: list[int]) -> Batch:
    """One row of documents of these lengths, all but their first tokens learned."""
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])  # [T]
    doc_ids = (positions == 0).cumsum(0) - 1  # [T]
    labels = torch.where(positions == 0, IGNORE_INDEX, ids)  # [T]
    return Batch(ids[None], positions[None], labels[None], doc_ids[None], n_docs=len(lengths))
