"""Cache a teacher's top-k log-probabilities in a file: `minitrain cache-teacher`.

The file is in the safetensors format. For each data file of T tokens, with KEY the hash of its tokens, it has

    KEY/teacher_ids      [T, k] int32, the k most likely tokens at each position
    KEY/teacher_logps    [T, k + 1] float32, their log-probabilities at the temperature, and that of all other tokens

Both are 0 for tokens that are not targets. On most disks, these zeros take no space. The metadata has the options.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minitrain.config.schema import Config
from minitrain.data.cache import TokenCache, cache_folder
from minitrain.data.loader import MicrobatchLoader, TokenizedDataset, load_data
from minitrain.data.template import make_template
from minitrain.distributed.parallel import SingleDevice, pick_device
from minitrain.distributed.process import world_size
from minitrain.errors import ConfigError, write_error_code
from minitrain.io.checksum import PLACEHOLDER, is_intact, seal
from minitrain.io.redact import stored_name
from minitrain.io.temp_files import new_file
from minitrain.io.tensor_files import start_file
from minitrain.losses import create_loss
from minitrain.losses.kd import IDS, LOGPS, KDOptions
from minitrain.model.fingerprint import model_fingerprint
from minitrain.model.kd_divergence import top_k_logprobs
from minitrain.model.load import load_tokenizer
from minitrain.model.vocabulary import count_ids
from minitrain.training.aux_models import Teacher, iter_batches_with_positions, load_teacher, teacher_config
from minitrain.training.compute import with_dtype
from minitrain.training.setup import make_loader


def cache_teacher_outputs(config: Config, output: Path | None = None) -> Path:
    """Write the teacher's `loss.top_k` most likely tokens for every target, and return the file.

    Args:
        config: The full config, with the loss kd.
        output: The file to write (default: next to the token cache, where an intact file is reused).

    Raises:
        ConfigError: An option does not fit, or the file cannot be written.
        DataError: A data row cannot be used.
    """
    loss = create_loss(**config.loss)
    _check_options(loss.requires, loss.options)
    parallel = SingleDevice(pick_device(config.device))
    config = with_dtype(config, parallel.device)
    tokenizer = load_tokenizer(config.model)
    if loss.options.top_k > count_ids(tokenizer):
        message = (
            f"loss.top_k: expected at most the tokenizer's {count_ids(tokenizer)} tokens, got {loss.options.top_k}."
        )
        raise ConfigError(f"{message} Lower it.", "out-of-range")
    data = load_data(config, make_template(tokenizer, config, loss.example_type), loss.example_type)
    caches = {cache.key: cache for cache in [*data.train.caches, *(data.eval.caches if data.eval else [])]}
    teacher_model = teacher_config(loss, config)
    options = {"temperature": loss.options.temperature, "top_k": loss.options.top_k, "n_tokens": count_ids(tokenizer)}
    options |= {"teacher": loss.options.teacher, "teacher_dtype": teacher_model.policy_dtype}
    if output is None:
        settings = [options, list(caches), model_fingerprint(teacher_model)]
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]
        output = cache_folder(config) / f"{digest}-teacher.safetensors"
        if output.exists():
            if is_intact(output):
                return output
            tqdm.write(f"{output}: damaged teacher outputs. Computing them again. [damaged-file]")
    teacher = load_teacher(loss, config, tokenizer, parallel)
    loader = make_loader(data.train, config, tokenizer, teacher.policy)
    metadata = {key: str(value) for key, value in options.items()} | {"teacher": stored_name(loss.options.teacher)}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with new_file(output, None if config.quiet else tqdm.write) as file:
            with _Writer(file, caches.values(), metadata) as writer:
                _write_outputs(teacher, caches.values(), loader, loss.options, writer)
            seal(file)
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot be written: {error.strerror}. Set --output.", write_error_code(error)
        ) from None
    return output


def _check_options(required: frozenset[str], options) -> None:
    if not isinstance(options, KDOptions):
        raise ConfigError("loss.name: only kd has a teacher. Set loss.name=kd.", "conflict")
    if "teacher" not in required:
        raise ConfigError(
            "loss.teacher_outputs: conflicts with cache-teacher, which computes new outputs. Set it to null.",
            "conflict",
        )
    if options.top_k is None:
        raise ConfigError("loss.top_k: is missing. Set it, for example to 64.", "missing-option")
    if world_size() > 1:
        raise ConfigError("minitrain cache-teacher supports one process only. Start it without torchrun.", "conflict")


def _write_outputs(teacher: Teacher, caches, loader: MicrobatchLoader, options: KDOptions, writer: "_Writer") -> None:
    """Write the outputs for the targets of each data file, the longest examples first."""
    total, quiet = sum(len(cache.offsets) - 1 for cache in caches), loader.config.quiet or None
    with tqdm(total=total, desc="teacher", unit=" documents", disable=quiet, leave=False) as bar:
        for cache in caches:
            file_loader = dataclasses.replace(loader, examples=TokenizedDataset([cache], [1.0]))
            for batch, positions in iter_batches_with_positions(cache, file_loader):
                hidden_states, lm_head = teacher.target_hidden_states(batch.to(teacher.precision.device))
                top = top_k_logprobs(hidden_states, lm_head, options.temperature, options.top_k)
                writer.write(f"{cache.key}/{IDS}", positions, top.ids.int())
                writer.write(f"{cache.key}/{LOGPS}", positions, top.logps)
                bar.update(batch.n_docs)


class _Writer:
    """Writes the rows of a safetensors file in any order."""

    def __init__(self, path: Path, caches: list[TokenCache], metadata: dict[str, str]):
        k, tensors = int(metadata["top_k"]), {}
        for cache in caches:
            for name, dtype, width in ((IDS, "I32", k), (LOGPS, "F32", k + 1)):
                tensors[f"{cache.key}/{name}"] = dtype, [len(cache.ids), width]
        self.file = open(path, "wb")
        self.starts = start_file(self.file, tensors, PLACEHOLDER | metadata)

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error) -> None:
        self.file.close()

    def write(self, name: str, positions: torch.Tensor, rows: torch.Tensor) -> None:
        """Write rows [n, width] at the positions [n] of a tensor of the file."""
        indices, values = positions.numpy(), rows.cpu().numpy()
        row_size = values.itemsize * values.shape[1]
        for run in np.split(np.arange(len(indices)), np.flatnonzero(np.diff(indices) != 1) + 1):
            if len(run):
                self.file.seek(self.starts[name] + int(indices[run[0]]) * row_size)
                self.file.write(values[run].tobytes())
