"""The models that a loss looks at besides the policy: a reference, which is what the policy was when training began.

It comes for the price of what is trained (`InitialValues`), as a model of its own (`FrozenModel`), or from a file of
its log-probabilities (`Precomputed`). All are called as the policy is and give `Scores` without gradients.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from .batch import Batch, Scores
from .data.cache import cache_folder
from .data.loader import Examples, Loader
from .engine.parallel import SingleDevice, local_rows
from .engine.precision import Precision
from .errors import ConfigError
from .evaluate import inference
from .losses import Loss
from .model.adapter_files import has_adapter
from .model.load import DTYPES, identity, load_frozen
from .model.policy import Policy, find_blocks
from .schema import Config

NOTED = "ref_logps"  # the column of precomputed log-probabilities


class InitialValues:
    """A copy of what is trained, as it is when this is made; of a sharded policy, each rank's own rows.

    With an adapter that is a copy of the adapter. A new LoRA adds nothing at first, so this is the base model; one that
    was loaded to go on with is the reference as it was loaded, and not the base with the adapter off (trl#1193).
    """

    def __init__(self, policy: nn.Module, parallel: SingleDevice):
        self.policy, self.parallel = policy, parallel
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.pairs = [(local_rows(p)[0].detach(), local_rows(p)[0].detach().clone()) for p in trained]

    def __call__(self, batch: Batch, **asked) -> Scores:
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

    def _put(self, values) -> None:
        for (rows, _), value in zip(self.pairs, values, strict=True):
            rows.data.copy_(value)
        self.parallel.reshard(self.policy)


class FrozenModel:
    """Another model, sharded as the policy is."""

    def __init__(self, policy: Policy, parallel: SingleDevice, dtype: torch.dtype):
        self.policy = parallel.wrap(policy, find_blocks(policy.model.base_model), dtype)

    def __call__(self, batch: Batch, **asked) -> Scores:
        with torch.no_grad():
            return self.policy(batch, **asked)


class Precomputed:
    """Log-probabilities that the policy gave before training, kept beside the token cache."""

    def __call__(self, batch: Batch, **asked) -> Scores:
        return Scores(batch.of_targets(NOTED), batch.target_docs, batch.n_docs)


def companions(
    loss: Loss,
    config: Config,
    policy: Policy,
    tokenizer,
    parallel: SingleDevice,
    precision: Precision,
    loaders: list[Loader],
) -> dict:
    """The models that a loss needs besides the policy, by the names of its arguments. Raises ConfigError."""
    models = {}
    if "reference" in loss.needs:
        kind = loss.options.reference
        if kind == "auto":
            kind = "adapter" if has_adapter(config) else "model"
        if kind == "adapter":
            models["reference"] = InitialValues(policy, parallel)
        elif kind == "precomputed":
            for cache in {id(c): c for loader in loaders for c in loader.examples.caches}.values():
                cache.columns[NOTED] = _noted(cache, loss, policy, config, parallel, precision, loaders[0])
            models["reference"] = Precomputed()
        else:
            models["reference"] = _own_model(config, policy, tokenizer, parallel, precision)
            _check_start(policy, models["reference"], loaders[0], parallel, precision)
    return models


def _own_model(config: Config, policy: Policy, tokenizer, parallel: SingleDevice, precision: Precision) -> FrozenModel:
    dtype = DTYPES[config.model.reference_dtype or config.model.policy_dtype]
    residual = policy.model.get_input_embeddings().weight.dtype
    with parallel.taking_turns():
        frozen = load_frozen(config.model, tokenizer, dtype, config.packing, residual)
    return FrozenModel(frozen, parallel, precision.dtype)


def _check_start(
    policy: Policy, reference: FrozenModel, loader: Loader, parallel: SingleDevice, precision: Precision
) -> None:
    """Before the first step, the reference says what the policy says. Raises ConfigError."""
    batch = loader.micro_batches(loader.order(0)[: parallel.world_size])[0].to(parallel.device)
    with torch.no_grad(), precision.autocast():
        ours, theirs = (model(batch).logps for model in (policy, reference))
    exact = precision.dtype == torch.float32 and reference.policy.model.dtype == torch.float32
    apart = (ours - theirs).abs().mean() if ours.numel() else ours.sum()
    parallel.reshard(policy)
    if parallel.max(float(apart)) > (1e-3 if exact else 0.1):
        raise ConfigError(
            f"loss.reference: the reference's log-probabilities are {float(apart):.2g} a token away from the policy's "
            "before the first step. Set model.reference_dtype to model.policy_dtype, or loss.reference=precomputed."
        )


def _noted(
    cache, loss: Loss, policy: Policy, config: Config, parallel: SingleDevice, precision: Precision, loader: Loader
) -> torch.Tensor:
    """The policy's log-probability of each learned token of a data file -> [tokens of the file] float32."""
    parts = {name: asdict(getattr(config, name)) for name in ("model", "lora", "soft_prompt")}
    settings = [cache.path.stem, identity(config.model), parts, config.seed, loss.temperature]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
    file = cache_folder(config) / f"{key}-reference.safetensors"
    if parallel.max(int(not _is_whole(file, len(cache.ids)))) == 0:
        return load_file(file)[NOTED]
    cache.columns["place"] = torch.arange(len(cache.ids))
    whole = Loader(
        Examples([cache], [1.0]), config, loader.pad_token_id, loader.rank, loader.world_size, loader.row_capacity
    )
    logps = torch.zeros(len(cache.ids))
    quiet = None if parallel.rank == 0 else True  # None: a bar, where there is a terminal
    with inference(policy), precision.autocast():
        for batch in tqdm(whole.eval_batches(), desc="the reference", unit=" batches", disable=quiet, leave=False):
            moved = batch.to(parallel.device)
            logps[moved.of_targets("place").cpu()] = policy(moved, temperature=loss.temperature).logps.float().cpu()
    parallel.reshard(policy)
    del cache.columns["place"]
    logps = parallel.sum(logps)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file({NOTED: logps}, part)
        part.replace(file)
    return logps


def _is_whole(file: Path, n_tokens: int) -> bool:
    try:
        return load_file(file)[NOTED].shape == (n_tokens,)
    except Exception:  # not there, or cut off: made anew
        return False
