"""The models that a loss looks at besides the policy: a reference and a teacher.

The reference is the policy at the start of training. It is a copy of the trainable parameters
(`InitialPolicySnapshot`), a model of its own (`FrozenModel`), or a file of log-probabilities (`PrecomputedRefLogps`).
All are called like the policy and return `PolicyOutput` without gradients. A `Teacher` is another model over the same
tokens.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from minitrain.batch import Batch, PolicyOutput
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.data.cache import cache_folder
from minitrain.data.loader import MicrobatchLoader, TokenizedDataset
from minitrain.distributed.parallel import SingleDevice, local_shard
from minitrain.errors import ConfigError
from minitrain.io.checksum import PLACEHOLDER, is_intact, seal
from minitrain.io.temp_files import new_file
from minitrain.io.tensor_files import save_file
from minitrain.losses import Loss, Models
from minitrain.model.adapter_config import has_adapter
from minitrain.model.fingerprint import model_fingerprint
from minitrain.model.load import DTYPES, build_frozen, load_tokenizer
from minitrain.model.logprobs import LMHead
from minitrain.model.policy import Policy, check_policy, find_blocks
from minitrain.model.vocabulary import count_ids

from .setup import check_lengths
from .step import Precision, inference

Load = Callable[[ModelConfig, Any, torch.dtype, bool, torch.dtype], Policy]  # as `build_frozen` is
REF_LOGPS = "ref_logps"  # the column of precomputed log-probabilities


class InitialPolicySnapshot:
    """A copy of what is trained, as it is when this is made; of a sharded policy, each rank's own rows.

    With an adapter that is a copy of the adapter. A new LoRA adds nothing at first, so this is the base model; one that
    was loaded to go on with is the reference as it was loaded, and not the base with the adapter off (trl#1193).
    """

    def __init__(self, policy: nn.Module, parallel: SingleDevice):
        self.policy, self.parallel = policy, parallel
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.pairs = [(local_shard(p)[0].detach(), local_shard(p)[0].detach().clone()) for p in trained]

    def __call__(self, batch: Batch, **asked) -> PolicyOutput:
        with self.restored(), inference(self.policy):
            return self.policy(batch, **asked)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the policy is what it was; after it, what it is."""
        now = [rows.clone() for rows, _ in self.pairs]
        self._put(value for _, value in self.pairs)
        try:
            yield
        finally:
            self._put(now)

    def tensors(self) -> list[torch.Tensor]:
        """What it keeps."""
        return [value for _, value in self.pairs]

    def _put(self, values) -> None:
        for (rows, _), value in zip(self.pairs, values, strict=True):
            rows.data.copy_(value)
        self.parallel.reshard(self.policy)


class FrozenModel:
    """Another model, sharded as the policy is, that computes in a dtype of its own."""

    def __init__(self, policy: Policy, parallel: SingleDevice, dtype: torch.dtype):
        self.policy = parallel.wrap(policy, find_blocks(policy.model.base_model), dtype)
        self.precision = Precision(dtype, parallel.device)

    def tensors(self) -> list[torch.Tensor]:
        """What it keeps."""
        return [*self.policy.parameters(), *self.policy.buffers()]

    def __call__(self, batch: Batch, **asked) -> PolicyOutput:
        with torch.no_grad(), self.precision.autocast():
            return self.policy(batch, **asked)


class Teacher(FrozenModel):
    """Another model over the same tokens."""

    def __init__(self, policy: Policy, parallel: SingleDevice, dtype: torch.dtype, n_tokens: int, packing: bool):
        """`n_tokens` are the tokenizer's; rows of the output layer beyond them are padding, which nobody learns from.

        Raises ConfigError for an architecture that minitrain would misread.
        """
        super().__init__(policy, parallel, dtype)
        self.n_tokens = n_tokens
        with self.precision.autocast():
            check_policy(self.policy, packing, parallel.device, lambda: parallel.unsharded(self.policy))
        parallel.reshard(self.policy)

    def target_hidden_states(self, batch: Batch) -> tuple[torch.Tensor, LMHead]:
        """What its distributions at the supervised tokens are made of: hidden states [N, H], and the output layer."""
        with torch.no_grad(), self.precision.autocast():
            hidden, layer = self.policy.target_hidden_states(batch)
        return hidden, layer.first(self.n_tokens)


class PrecomputedRefLogps:
    """Log-probabilities that the policy gave before training, kept beside the token cache."""

    def tensors(self) -> list[torch.Tensor]:
        """What it keeps: a batch brings its own."""
        return []

    def __call__(self, batch: Batch, **asked) -> PolicyOutput:
        return PolicyOutput(batch.target_feature(REF_LOGPS), batch.target_docs, batch.n_docs)


def build_aux_models(
    loss: Loss,
    config: Config,
    policy: Policy,
    tokenizer,
    parallel: SingleDevice,
    precision: Precision,
    loaders: list[MicrobatchLoader],
    load: Load | None = None,
) -> Models:
    """Return the policy with the models that a loss requires besides it. Raises ConfigError.

    `load` makes those with weights of their own; `build_frozen` when left out.
    """
    teacher, reference, load = None, None, load or build_frozen
    if "teacher" in loss.requires:
        teacher = load_teacher(loss, config, tokenizer, parallel, load)
        for loader in loaders:
            check_lengths(loader.examples, teacher.policy)
    if "reference" in loss.requires:
        reference = _build_reference(loss, config, policy, tokenizer, parallel, precision, loaders, load)
    return Models(policy, reference, teacher)


def _build_reference(
    loss: Loss,
    config: Config,
    policy: Policy,
    tokenizer,
    parallel: SingleDevice,
    precision: Precision,
    loaders: list[MicrobatchLoader],
    load: Load,
) -> InitialPolicySnapshot | PrecomputedRefLogps | FrozenModel:
    caches = list({id(cache): cache for loader in loaders for cache in loader.examples.caches}.values())
    if all(REF_LOGPS in cache.token_features for cache in caches):  # the rows have them
        return PrecomputedRefLogps()
    kind = reference_kind(loss, config)
    if kind == "adapter":
        return InitialPolicySnapshot(policy, parallel)
    if kind == "precomputed":
        for cache in caches:
            cache.token_features[REF_LOGPS] = _load_or_compute_ref_logps(
                cache, loss, policy, config, parallel, precision, loaders[0]
            )
        return PrecomputedRefLogps()
    reference = _own_model(config, policy, tokenizer, parallel, precision, load)
    _check_reference_matches_policy(policy, reference, loaders[0], parallel, precision)
    return reference


def reference_kind(loss: Loss, config: Config) -> str:
    """How a loss that needs a reference gets it: model, adapter or precomputed."""
    kind = loss.options.reference
    return kind if kind != "auto" else "adapter" if has_adapter(config) else "model"


def load_teacher(loss: Loss, config: Config, tokenizer, parallel: SingleDevice, load: Load = build_frozen) -> Teacher:
    """The teacher that the options of a loss name. Raises ConfigError for one with another tokenizer."""
    if loss.options.teacher is None:
        raise ConfigError("loss.teacher: is missing; name the folder or the hub name of a model.", "missing-option")
    chosen = teacher_config(loss, config)
    with parallel.local_rank0_first():
        policy = build_teacher(chosen, tokenizer, config.packing, load)
    return Teacher(policy, parallel, DTYPES[chosen.policy_dtype], count_ids(tokenizer), config.packing)


def build_teacher(teacher: ModelConfig, tokenizer, packing: bool, load: Load = build_frozen) -> Policy:
    """Build the policy of a teacher. Raises ConfigError for one with another tokenizer."""
    check_teacher_tokenizer(teacher, tokenizer)
    return load(teacher, tokenizer, DTYPES[teacher.policy_dtype], packing, torch.float32)


def teacher_config(loss: Loss, config: Config) -> ModelConfig:
    """Which model the teacher is. Revision, archive and adapter of `model` are the policy's own."""
    return ModelConfig(
        loss.options.teacher,
        policy_dtype=loss.options.teacher_dtype or config.model.policy_dtype,
        attn_implementation=config.model.attn_implementation,
        trust_remote_code=config.model.trust_remote_code,
    )


def check_teacher_tokenizer(teacher: ModelConfig, ours) -> None:
    """Raise ConfigError when an id does not stand for the same token in the teacher's tokenizer and in ours."""
    theirs, name = load_tokenizer(teacher), teacher.name_or_path
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if differing := sorted(token for token in mine.keys() | other.keys() if mine.get(token) != other.get(token)):
        token = differing[0]
        raise ConfigError(
            f"loss.teacher: {name} has another tokenizer: {len(differing)} tokens differ, {token!r} for one is number "
            f"{mine.get(token)} in the model's tokenizer and {other.get(token)} in the teacher's, so that their "
            "distributions cannot be compared. Choose a teacher of the model's family.",
            "mismatch",
        )


def _own_model(
    config: Config, policy: Policy, tokenizer, parallel: SingleDevice, precision: Precision, load: Load
) -> FrozenModel:
    dtype = DTYPES[config.model.reference_dtype or config.model.policy_dtype]
    residual = policy.model.get_input_embeddings().weight.dtype
    with parallel.local_rank0_first():
        frozen = load(config.model, tokenizer, dtype, config.packing, residual)
    # As the policy does; but weights in less than float32 have to meet their like.
    return FrozenModel(frozen, parallel, dtype if precision.dtype == torch.float32 else precision.dtype)


def _check_reference_matches_policy(
    policy: Policy, reference: FrozenModel, loader: MicrobatchLoader, parallel: SingleDevice, precision: Precision
) -> None:
    """Before the first step, the reference says what the policy says. Raises ConfigError."""
    batch = loader.micro_batches(loader.order(0)[: parallel.world_size])[0].to(parallel.device)
    with torch.no_grad(), precision.autocast():
        ours, theirs = (model(batch).logps for model in (policy, reference))
    apart = (ours - theirs).abs().mean() if ours.numel() else ours.sum()
    parallel.reshard(policy)
    if parallel.max(float(apart)) > _tolerance(precision, policy, reference.policy):
        raise ConfigError(
            f"loss.reference: the reference's log-probabilities are {float(apart):.2g} a token away from the policy's "
            "before the first step. Set model.reference_dtype to model.policy_dtype, or loss.reference=precomputed.",
            "mismatch",
        )


def _tolerance(precision: Precision, *policies: Policy) -> float:
    """Return the largest mean difference between logps that are equal up to rounding."""
    exact = precision.dtype == torch.float32 and all(policy.model.dtype == torch.float32 for policy in policies)
    return 1e-3 if exact else 0.1


def _load_or_compute_ref_logps(
    cache,
    loss: Loss,
    policy: Policy,
    config: Config,
    parallel: SingleDevice,
    precision: Precision,
    loader: MicrobatchLoader,
) -> torch.Tensor:
    """The policy's log-probability of each learned token of a data file -> [tokens of the file] float32."""
    parts = {name: asdict(getattr(config, name)) for name in ("model", "lora", "soft_prompt")}
    settings = [cache.key, model_fingerprint(config.model), parts, config.seed, loss.temperature]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    file = cache_folder(config) / f"{key}-reference.safetensors"
    whole = dataclasses.replace(loader, examples=TokenizedDataset([cache], [1.0]))
    noted = _read_ref_logps(file, len(cache.ids))
    if parallel.max(int(noted is None)) == 0 and _still_right(noted, cache, loss, policy, parallel, precision, whole):
        return noted
    logps = torch.zeros(len(cache.ids))
    quiet = True if parallel.rank or config.quiet else None  # None: a bar, where there is a terminal
    with inference(policy), precision.autocast():
        found = iter_batches_with_positions(cache, whole)
        for batch, places in tqdm(found, desc="the reference", unit=" batches", disable=quiet, leave=False):
            scores = policy(batch.to(parallel.device), temperature=loss.temperature)
            logps[places] = scores.logps.float().cpu()
    parallel.reshard(policy)
    logps = parallel.sum(logps)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        with new_file(file) as made:
            save_file({REF_LOGPS: logps}, made, PLACEHOLDER)
            seal(made)
    return logps


def _still_right(
    noted: torch.Tensor,
    cache,
    loss: Loss,
    policy: Policy,
    parallel: SingleDevice,
    precision: Precision,
    loader: MicrobatchLoader,
) -> bool:
    """Return whether the policy gives the noted log-probabilities for the first batch of a data file, on all ranks."""
    apart = 0.0
    with (
        inference(policy),
        precision.autocast(),
        contextlib.closing(iter_batches_with_positions(cache, loader)) as batches,
    ):
        for batch, places in itertools.islice(batches, 1):
            logps = policy(batch.to(parallel.device), temperature=loss.temperature).logps.float().cpu()
            apart = float((logps - noted[places]).abs().mean()) if len(logps) else 0.0
    parallel.reshard(policy)
    return parallel.max(apart) <= _tolerance(precision, policy)


def iter_batches_with_positions(cache, loader: MicrobatchLoader) -> Iterator[tuple[Batch, torch.Tensor]]:
    """This rank's batches of all of a data file, and where in the file the supervised tokens of each are -> [N]."""
    cache.token_features["place"] = torch.arange(len(cache.ids))
    try:
        for batch in loader.eval_batches():
            yield batch, batch.target_feature("place").long()
    finally:
        del cache.token_features["place"]


def _read_ref_logps(file: Path, n_tokens: int) -> torch.Tensor | None:
    if not file.exists():
        return None
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        if is_intact(file) and (noted := load_file(file)[REF_LOGPS]).shape == (n_tokens,):  # [T]
            return noted
    tqdm.write(f"{file}: the log-probabilities of the reference are damaged, and are computed again [damaged-file]")
    return None
