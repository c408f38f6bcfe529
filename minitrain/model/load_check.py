"""Check on a few tokens that minitrain computes what an architecture of transformers computes."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from minitrain.batch import IGNORE_INDEX, Batch
from minitrain.errors import ConfigError

from .decoder import decoder_of
from .policy import Policy
from .sequence_head import EncoderScorer, Scorer


def check_policy(
    policy: Policy,
    packing: bool,
    device: torch.device | str = "cpu",
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Check the assumptions of minitrain about an architecture on a few tokens.

    Args:
        policy: The loaded policy.
        packing: Also select how documents of packed rows are kept apart.
        device: Device of the tokens.
        gathered: Context in which modules of a sharded policy can be called.

    Raises:
        ConfigError: The logps differ from the model's own.
    """
    if any(is_fake(parameter) for parameter in policy.parameters()):
        return  # they have no values to compare
    training = policy.training
    policy.eval()
    ids = torch.arange(3, 15, device=device) % policy.model.config.get_text_config().vocab_size  # [12]
    if isinstance(policy, Scorer):
        pad = policy.model.config.get_text_config().pad_token_id
        _check_scores(policy, ids[ids != pad], gathered)
    elif not isinstance(policy, EncoderScorer):  # its head is that of transformers
        _check_head(policy, ids, gathered)
    if packing:
        select_packing(policy, ids)
    policy.train(training)


LARGE_LOGIT = 30.0  # large enough that a softcap, a scale or a multiplier changes the logps


def _check_head(policy: Policy, ids: Tensor, gathered: Callable[[], AbstractContextManager]) -> None:
    """Compare the logps, then those of hidden states that are scaled until the largest logit is `LARGE_LOGIT`.

    The logits of a new model are so small that rounding would hide a softcap or a scale.
    """
    largest = _compare_logps(policy, ids, gathered, 1.0)
    if largest > 0:
        _compare_logps(policy, ids, gathered, LARGE_LOGIT / largest)


@torch.no_grad()
def _compare_logps(policy: Policy, ids: Tensor, gathered: Callable[[], AbstractContextManager], scale: float) -> float:
    """Compare the policy with its model on the last hidden states times `scale`; return the largest logit."""
    has_soft_prompt = policy.has_soft_prompt
    policy.has_soft_prompt = False  # the model's own logits do not include the prompt
    with _scaled_states(policy.model, scale) as calls:
        actual = policy(make_row(ids, [12])).logps  # [11]
        policy.has_soft_prompt = has_soft_prompt
        with gathered():
            logits = policy.model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # [11, V]
    if len(calls) != 2:
        return 0.0  # the model calls its decoder without its hooks
    if not logits.isfinite().all():
        raise ConfigError(
            "model.name_or_path: the model outputs NaN or infinity: its weights are damaged, or too large "
            "for policy_dtype. Download it again, or set policy_dtype=float32.",
            "not-finite",
        )
    expected = logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]  # [11]
    largest = float(logits.abs().max())
    tolerance = 1e-3 if logits.dtype == torch.float32 else 1e-2 + largest / 64
    relative = tolerance if scale == 1.0 else min(tolerance, 1e-2)
    if not torch.allclose(expected, actual, rtol=relative, atol=tolerance):
        raise ConfigError(
            f"model.name_or_path: the output layer of {type(policy.model).__name__} is not supported: its "
            "log-probabilities would be wrong. Please report this architecture.",
            "unsupported-model",
        )
    return largest


@contextmanager
def _scaled_states(model: nn.Module, scale: float) -> Iterator[list]:
    """Within the context, multiply the last hidden states of a model by `scale`; yield the list of calls."""
    calls = []

    def scaled(module, inputs, outputs):
        calls.append(module)
        outputs.last_hidden_state = outputs.last_hidden_state * scale
        return outputs

    hook = decoder_of(model).register_forward_hook(scaled)
    try:
        yield calls
    finally:
        hook.remove()


@torch.no_grad()
def _check_scores(policy: Scorer, ids: Tensor, gathered) -> None:
    """Compare the scores of one document [n] with the model's own. Raises ConfigError."""
    has_soft_prompt = policy.has_soft_prompt
    policy.has_soft_prompt = False  # the model's own logits do not include the prompt
    actual = policy(make_row(ids, [len(ids)])).scores[0]  # [L]
    policy.has_soft_prompt = has_soft_prompt
    base = policy.model.get_input_embeddings().weight.dtype  # the head may be float32
    mixed = contextlib.nullcontext() if base == torch.float32 else torch.autocast(ids.device.type, base)
    with gathered(), mixed:
        expected = policy.model(input_ids=ids[None], use_cache=False).logits[0].float()  # [L]
    if not torch.allclose(actual, expected, rtol=2e-2, atol=2e-2 + float(expected.abs().max()) / 64):
        raise ConfigError(
            f"model.name_or_path: the head of {type(policy.model).__name__} is not supported: its "
            "scores would be wrong. Please report this architecture.",
            "unsupported-model",
        )


def select_packing(policy: Policy, ids: Tensor) -> None:
    """Set `groups_documents` of a policy that cannot separate the documents of a packed row."""
    policy.groups_documents = False
    # Attention by document has no chunks, and no document here is longer than one. Soft prompts come before a row.
    is_chunked = getattr(policy.model.config.get_text_config(), "attention_chunk_size", None) is not None
    needs_groups = is_chunked or policy.has_soft_prompt or not _separates_documents(policy, ids)
    policy.groups_documents = bool(policy.max_over_ranks(needs_groups))


def _separates_documents(policy: Policy, ids: Tensor) -> bool:
    """Return whether the output for the second of two documents in a row depends on nothing of the first.

    The gradient of the first one's embeddings must be 0: state, convolutions and attention are seen at any strength.
    The output must be that of the second one alone: positions are seen.
    """
    embeddings = []

    def record(module, args, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())  # [1, 12, H]
        return embeddings[-1].clone()  # a model may change the clone in place

    try:
        hook = policy.model.get_input_embeddings().register_forward_hook(record)
        try:
            with torch.enable_grad():
                packed = _outputs(policy, make_row(ids, [5, len(ids) - 5]))[1]
                gradient = torch.autograd.grad(packed.sum(), embeddings[0])[0]  # [1, 12, H]
        finally:
            hook.remove()
        with torch.no_grad():
            alone = _outputs(policy, make_row(ids[5:], [len(ids) - 5]))[0]
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False  # the model cannot read the mask or the positions of packed rows
    # The median: in 16 bits, rounding may send single tokens to other experts.
    exact = policy.model.dtype == torch.float32 and not torch.is_autocast_enabled(ids.device.type)
    difference = (packed - alone).abs().median()
    return not gradient[0, :5].any() and bool(difference <= (1e-4 if exact else 3e-2) * (1 + alone.abs().median()))


def _outputs(policy: Policy, batch: Batch) -> list[Tensor]:
    """Return the scores [L] or logps of each document."""
    output = policy(batch)
    if output.scores is not None:
        return list(output.scores)
    return [output.logps[output.doc_ids == d] for d in range(batch.n_docs)]


def make_row(ids: Tensor, lengths: list[int]) -> Batch:
    """Return a batch of one row with documents of these lengths; all tokens but the first of each are targets."""
    positions = torch.cat([torch.arange(length, device=ids.device) for length in lengths])  # [T]
    doc_ids = (positions == 0).cumsum(0) - 1  # [T]
    labels = torch.where(positions == 0, IGNORE_INDEX, ids)  # [T]
    return Batch(ids[None], positions[None], labels[None], doc_ids[None], n_docs=len(lengths))
