"""Check on a few tokens that minitrain computes what an architecture of transformers computes."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from minitrain.batch import Batch, Document, collate
from minitrain.errors import ConfigError

from .decoder import decoder_of
from .document_check import SHORT, check_documents, explained, is_exact, padded_batch, random_documents
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
        ConfigError: The output differs from that of transformers, or depends on the batch of a document.
    """
    if any(is_fake(parameter) for parameter in policy.parameters()):
        return  # they have no values to compare
    training = policy.training
    policy.eval()
    check_output_layer(policy, device, gathered)
    if isinstance(policy, EncoderScorer):
        check_encoder(policy, device)
    else:
        check_documents(policy, packing, device, gathered)
    policy.train(training)


def check_output_layer(
    policy: Policy,
    device: torch.device | str = "cpu",
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Compare the logps or scores of a policy with those of its model. Raises ConfigError."""
    if isinstance(policy, EncoderScorer):
        return  # its head is that of transformers
    ids = torch.arange(3, 15, device=device) % policy.model.config.get_text_config().vocab_size  # [12]
    with explained(f"model.name_or_path: {type(policy.model).__name__} cannot be computed"):
        if isinstance(policy, Scorer):
            pad = policy.model.config.get_text_config().pad_token_id
            _check_scores(policy, ids[ids != pad], gathered)
        else:
            _check_head(policy, ids, gathered)


@torch.no_grad()
def check_encoder(policy: EncoderScorer, device: torch.device | str = "cpu") -> None:
    """Set whether the scores of an encoder ignore padding.

    Raises:
        ConfigError: The model raises an error, also in training mode, or it depends on padding and is sharded.
    """
    name = type(policy.model).__name__
    documents = random_documents(policy, SHORT)
    with explained(f"model.name_or_path: {name} cannot be computed"):
        padded = policy(padded_batch(policy, [[document] for document in documents], device)).scores  # [2, L]
        alone = torch.cat([policy(padded_batch(policy, [[document]], device)).scores for document in documents])
        with torch.random.fork_rng():  # of dropout
            policy.train()
            policy(padded_batch(policy, [documents[1:]], device))
            policy.eval()
    tolerance = (1e-4 if is_exact(policy, padded.device) else 2e-2) * float(alone.abs().max())
    policy.ignores_padding = torch.allclose(padded, alone, rtol=0.0, atol=tolerance, equal_nan=True)
    if not policy.ignores_padding and uses_fsdp(policy):
        raise ConfigError(
            f"model.name_or_path: the scores of {name} depend on padding, so documents of each length are computed by "
            "themselves, which ranks with shards cannot do. Train it on one GPU, or choose another model.",
            "unsupported-model",
        )


def uses_fsdp(policy: Policy) -> bool:
    from torch.distributed.fsdp import FSDPModule  # takes half a second to import

    return isinstance(policy, FSDPModule)


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
        actual = policy(_one_row(ids)).logps  # [11]
        policy.has_soft_prompt = has_soft_prompt
        with gathered():
            logits = policy.model(input_ids=ids[None], use_cache=False).logits[0, :-1]  # [11, V]
    if len(calls) != 2:
        return 0.0  # the model calls its decoder without its hooks
    if (~logits.isfinite()).any():
        raise ConfigError(
            "model.name_or_path: the model outputs NaN or infinity: its weights are damaged, or too large "
            "for policy_dtype. Download it again, or set policy_dtype=float32.",
            "not-finite",
        )
    expected = logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]  # [11]
    largest = float(logits.abs().max())
    tolerance = 1e-3 if is_exact(policy, ids.device) else 1e-2 + largest / 64
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
    actual = policy(_one_row(ids)).scores[0]  # [L]
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


@torch.no_grad()
def check_autocast(policy: Policy, autocast: torch.autocast) -> None:
    """Check that a model can be run in policy_dtype. Raises ConfigError."""
    ids = torch.arange(3, 15, device=policy.model.get_input_embeddings().weight.device)  # [12]
    dtype = str(autocast.fast_dtype).removeprefix("torch.")
    reason = f"model.policy_dtype: {type(policy.model).__name__} cannot be computed in {dtype}"
    with autocast, explained(reason, "Set model.policy_dtype=float32."):
        policy(_one_row(ids))


def _one_row(ids: Tensor) -> Batch:
    """Return a batch of one document [n]; all tokens but the first are targets."""
    mask = (torch.arange(len(ids)) > 0).to(torch.uint8)
    return collate([[Document(ids.cpu().int(), mask)]], 0).to(ids.device)
