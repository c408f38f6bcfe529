"""Check that the hidden states of a document do not depend on its batch.

They must not depend on later tokens, on padding and other documents of a batch, or on those of a packed row.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from minitrain.batch import Batch, Document, collate
from minitrain.errors import ConfigError

from .decoder import find_blocks
from .diagnostics import first_line
from .few_blocks import distinct_blocks, with_few_blocks
from .policy import Policy
from .sequence_head import Scorer

SHORT = 32, 21  # tokens of two documents
DIVIDES_ROWS = re.compile("attention_chunk_size|index.*topk|budget|keep_window")  # chunks, or top-k of the keys
SPAN = re.compile("window|chunk|topk|top_k|budget|block_size|local_attention")  # options: keys that a token attends to
HEADS = re.compile("heads?$")
MAX_FLOPS = {"cuda": 4e13, "cpu": 4e9}  # of the comparison of packed rows; less than a second
MAX_SCORES = {"cuda": 1 << 28, "cpu": 1 << 24}  # attention scores that are in memory
MAX_ID = 1000  # ids of the tokens are lower: `validate` has only the first rows of the embeddings
MAX_SHARE = 0.2  # of a packed document's tokens may differ: rounding can lead to another expert
KEEP_DOCUMENTS_APART = "Set packing=false (group_by_length=true also saves padding)."


def check_documents(
    policy: Policy,
    packing: bool,
    device: torch.device | str = "cpu",
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Compare the hidden states of documents in a batch with those of each document alone.

    Documents of a packed row are longer than any window, chunk or top-k in the model's config. If `MAX_FLOPS` or
    `MAX_SCORES` do not allow this, they are shorter, and what happens beyond that length is not checked.

    Args:
        policy: The policy, in evaluation mode.
        packing: Also select how documents of packed rows are kept apart.
        device: Device of the tokens.
        gathered: Context in which modules of a sharded policy can be called.

    Raises:
        ConfigError: The hidden states differ, or the model raises an error.
    """
    device, name = torch.device(device), type(policy.model).__name__

    def check_padded() -> None:
        reason = f"model.name_or_path: {name} cannot be computed"
        with explained(reason), gathered():
            _check_padded(policy, device)

    def check_packed() -> None:
        with explained(f"packing: {name} cannot read packed rows", KEEP_DOCUMENTS_APART, "conflict"):
            if not policy.groups_documents:
                _check_gradient(policy, device)
            with gathered():
                _check_packed(policy, lengths, device)

    with torch.compiler.set_stance("force_eager"):
        with_few_blocks(policy, check_padded)
        if packing:
            lengths = packed_lengths(policy, device)
            _select_packing(policy, check_packed)
            if policy.groups_documents:
                with_few_blocks(policy, check_packed)


def _select_packing(policy: Policy, check_packed: Callable[[], None]) -> None:
    """Set `groups_documents` of a policy that cannot separate the documents of a packed row."""
    policy.groups_documents = False
    # Attention by document has no chunks and selects no keys, and the check can be too short for both. Soft prompts
    # come before a row.
    options = vars(policy.model.config.get_text_config()).items()
    divides_rows = any(DIVIDES_ROWS.search(name) and isinstance(value, int) for name, value in options)
    needs_groups = divides_rows or policy.has_soft_prompt
    try:
        if not needs_groups:
            with_few_blocks(policy, check_packed)
    except ConfigError:
        needs_groups = True
    policy.groups_documents = bool(policy.max_over_ranks(needs_groups))


@contextmanager
def explained(reason: str, advice: str = "Choose another model.", code: str = "unsupported-model") -> Iterator[None]:
    """Within the context, turn an error of the model into a ConfigError."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.distributed.DistError, ConfigError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{reason} ({first_line(error)}). {advice}", code) from None


@torch.no_grad()
def _check_padded(policy: Policy, device: torch.device) -> None:
    """Compare a document with its beginning, which is padded, and this with the beginning alone."""
    (long, _), name = random_documents(policy, SHORT), type(policy.model).__name__
    start = Document(long.ids[: SHORT[1]], long.mask[: SHORT[1]])
    states, padded = _hidden_states(policy, [[long], [start]], device)  # [32, H], [21, H]
    if _differ(policy, padded, states[: SHORT[1]], 0.5):
        raise ConfigError(
            f"model.name_or_path: {name} is not causal: tokens attend to later ones. Choose a causal language model.",
            "unsupported-model",
        )
    (alone,) = _hidden_states(policy, [[start]], device)  # [21, H]
    if _differ(policy, padded, alone, 0.5):
        raise ConfigError(
            f"model.name_or_path: the output of {name} for a document depends on the padding of its batch. "
            "Choose another model.",
            "unsupported-model",
        )


@torch.no_grad()
def _check_packed(policy: Policy, lengths: tuple[int, int], device: torch.device) -> None:
    """Compare two documents of a packed row with those of a padded batch."""
    documents = random_documents(policy, lengths)
    alone = _hidden_states(policy, [[document] for document in documents], device)
    packed = _hidden_states(policy, [documents], device)
    if any(_differ(policy, *states, MAX_SHARE) for states in zip(packed, alone, strict=True)):
        raise ConfigError(
            f"packing: the output of {type(policy.model).__name__} for a document of {lengths[1]} tokens differs in a "
            f"packed row. {KEEP_DOCUMENTS_APART}",
            "conflict",
        )


def _check_gradient(policy: Policy, device: torch.device) -> None:
    """Check that the output for the second document does not depend on the embeddings of the first."""
    embeddings = []

    def record(module, args, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())  # [1, 12, H]
        return embeddings[-1].clone()  # a model may change the clone in place

    hook = policy.model.get_input_embeddings().register_forward_hook(record)
    try:
        with torch.enable_grad():
            output = policy(collate([random_documents(policy, (5, 7))], 0).to(device))
            score = output.scores[1].sum() if isinstance(policy, Scorer) else output.per_document(output.logps)[1]  # []
    finally:
        hook.remove()
    gradient = torch.autograd.grad(score, embeddings[0])[0]  # [1, 12, H]
    if gradient[0, :5].any():
        raise ConfigError(
            f"packing: {type(policy.model).__name__} lets documents of a packed row attend to each other. "
            f"{KEEP_DOCUMENTS_APART}",
            "conflict",
        )


def packed_lengths(policy: Policy, device: torch.device) -> tuple[int, int]:
    """Return the lengths of two documents that are longer than the model's window, if their cost allows it."""
    longest = max([SHORT[1], *(span * 3 // 2 for span in _numbers(policy, SPAN))])
    n_positions = min(policy.position_limit, policy.rotary_limit)  # for both documents: some models count from the row
    while longest > SHORT[1]:
        lengths = longest * 3 // 2, longest
        if sum(lengths) <= n_positions and _is_cheap(policy, lengths, device):
            return lengths
        longest //= 2
    return min(SHORT[0], n_positions // 2), min(SHORT[1], n_positions // 2)


def _numbers(policy: Policy, name: re.Pattern) -> list[int]:
    """Return the integers of a model's config, and of dictionaries in it, whose names match a pattern."""
    found, options = [], [policy.model.config.get_text_config().to_dict()]
    for section in options:
        options.extend(value for value in section.values() if isinstance(value, dict))
        found += [value for key, value in section.items() if isinstance(value, int) and name.search(str(key))]
    return found


def _is_cheap(policy: Policy, lengths: tuple[int, int], device: torch.device) -> bool:
    """Return whether documents of these lengths can be compared in one block of each kind."""
    blocks, kept = find_blocks(policy.model), distinct_blocks(policy)
    width = policy.model.get_input_embeddings().weight.shape[-1]
    n_parameters = sum(parameter.numel() for number in kept for parameter in blocks[number].parameters())
    row = sum(lengths) if policy.attention_is_quadratic_in_row else max(lengths)
    flops = 2 * n_parameters * (sum(lengths) + 2 * max(lengths)) + len(kept) * 12 * width * row**2
    kind = "cuda" if device.type == "cuda" else "cpu"
    return flops <= MAX_FLOPS[kind] and max([1, *_numbers(policy, HEADS)]) * row**2 <= MAX_SCORES[kind]


def random_documents(policy: Policy, lengths: tuple[int, ...]) -> list[Document]:
    """Return documents of random tokens."""
    limit = min(policy.model.config.get_text_config().vocab_size, MAX_ID)
    generator = torch.Generator().manual_seed(0)
    documents = []
    for length in lengths:
        ids = torch.randint(min(3, limit - 1), limit, (length,), generator=generator)  # [T]
        documents.append(Document(ids, (torch.arange(length) > 0).to(torch.uint8)))
    return documents


def padded_batch(policy: Policy, rows: list[list[Document]], device: torch.device | str) -> Batch:
    """Return a batch of these rows of documents."""
    pad_token_id = getattr(policy.model.config.get_text_config(), "pad_token_id", None) or 0
    return collate(rows, pad_token_id if pad_token_id < MAX_ID else 0).to(device)


def _hidden_states(policy: Policy, rows: list[list[Document]], device: torch.device) -> list[Tensor]:
    """Return the last hidden states of each document, shape [T, H]."""
    batch = padded_batch(policy, rows, device)
    states = policy.hidden_states(batch)  # [R, T, H]
    return [states[row, start:stop].float() for row, start, stop in batch.spans.tolist()]


def _differ(policy: Policy, actual: Tensor, expected: Tensor, max_share: float) -> bool:
    """Return whether hidden states [T, H] differ by more than rounding at more than a share of the tokens."""
    scale = expected.norm(dim=1).mean()  # []
    if not (scale.isfinite() and scale > 0):
        return False  # `check_policy` refuses what is not finite
    errors = (actual - expected).norm(dim=1) / scale  # [T]
    return float((~(errors <= (1e-3 if is_exact(policy, actual.device) else 0.1))).float().mean()) > max_share


def is_exact(policy: Policy, device: torch.device) -> bool:
    """Return whether the policy computes in float32, so that its rounding errors are small."""
    autocast = torch.is_autocast_enabled(device.type)
    return not autocast and all(parameter.dtype == torch.float32 for parameter in policy.parameters())
