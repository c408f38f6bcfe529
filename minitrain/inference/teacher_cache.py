"""What a teacher says of all data of a config, noted in a file: `minitrain cache-teacher`.

The file is safetensors. For each data file, by the hash of its tokens, it holds of each of T tokens

    KEY/teacher_ids      [T, k] int32, the k likeliest tokens in this one's place
    KEY/teacher_logps    [T, k + 1] float32, their log-probabilities at the temperature, and that of all other tokens

with zeros, which take no space on most disks, for tokens that are not learned. Its metadata holds the options that it
was made with.
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
from minitrain.training.setup import make_loader


def teach(config: Config, output: Path | None = None) -> Path:
    """Writes the teacher's `loss.top_k` likeliest tokens for every supervised token; returns where.

    Without `output` that is beside the token cache, where it stays when it is there already. Raises ConfigError.
    """
    loss = create_loss(**config.loss)
    _check(loss.requires, loss.options)
    parallel = SingleDevice(pick_device(config.device))
    tokenizer = load_tokenizer(config.model)
    if loss.options.top_k > count_ids(tokenizer):
        raise ConfigError(
            f"loss.top_k: is {loss.options.top_k}, and the tokenizer has {count_ids(tokenizer)} tokens.", "out-of-range"
        )
    data = load_data(config, make_template(tokenizer, config, loss.example_type), loss.example_type)
    found = [*data.train.caches, *(data.eval.caches if data.eval else [])]
    caches = {cache.key: cache for cache in found}
    chosen = teacher_config(loss, config)
    made = {"temperature": loss.options.temperature, "top_k": loss.options.top_k, "n_tokens": count_ids(tokenizer)}
    made |= {"teacher": loss.options.teacher, "teacher_dtype": chosen.policy_dtype}
    if output is None:
        digest = hashlib.sha256(json.dumps([made, list(caches), model_fingerprint(chosen)]).encode()).hexdigest()[:32]
        output = cache_folder(config) / f"{digest}-teacher.safetensors"
        if output.exists():
            if is_intact(output):
                return output
            tqdm.write(f"{output}: the teacher's outputs are damaged, and are computed again")
    noted = made | {"teacher": stored_name(loss.options.teacher)}
    teacher = load_teacher(loss, config, tokenizer, parallel)
    loader = make_loader(data.train, config, tokenizer, teacher.policy)
    metadata = {key: str(value) for key, value in noted.items()}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with new_file(output, None if config.quiet else tqdm.write) as file:
            with _Writer(file, caches.values(), metadata) as writer:
                _ask(teacher, caches.values(), loader, loss.options, writer)
            seal(file)
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error.strerror}. Name another place with --output.", write_error_code(error)
        ) from None
    return output


def _check(needs: frozenset[str], options) -> None:
    if not isinstance(options, KDOptions):
        raise ConfigError("loss.name: only kd has a teacher; set loss.name=kd.", "conflict")
    if "teacher" not in needs:
        raise ConfigError(
            "loss.teacher_outputs: names a file that is there; set it to null to make a new one.", "conflict"
        )
    if options.top_k is None:
        raise ConfigError(
            "loss.top_k: is missing; it says how many tokens are noted, for example loss.top_k=64.", "missing-option"
        )
    if world_size() > 1:
        raise ConfigError("minitrain cache-teacher works on one device; start it without torchrun.", "conflict")


def _ask(teacher: Teacher, caches, loader: MicrobatchLoader, options: KDOptions, writer: "_Writer") -> None:
    """Each data file's supervised tokens, the longest examples first."""
    total, quiet = sum(map(len, caches)), loader.config.quiet or None
    with tqdm(total=total, desc="teacher", unit=" examples", disable=quiet, leave=False) as bar:
        for cache in caches:
            whole = dataclasses.replace(loader, examples=TokenizedDataset([cache], [1.0]))
            for batch, places in iter_batches_with_positions(cache, whole):
                states = teacher.target_hidden_states(batch.to(teacher.precision.device))
                top = top_k_logprobs(*states, options.temperature, options.top_k)
                writer.write(f"{cache.key}/{IDS}", places, top.ids.int())
                writer.write(f"{cache.key}/{LOGPS}", places, top.logps)
                bar.update(batch.n_docs)


class _Writer:
    """A safetensors file whose rows are written in any order."""

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

    def write(self, name: str, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Row i [n, width] to row `places[i]` [n] of a tensor."""
        where, numbers = places.numpy(), rows.cpu().numpy()
        size = numbers.itemsize * numbers.shape[1]
        for run in np.split(np.arange(len(where)), np.flatnonzero(np.diff(where) != 1) + 1):
            if len(run):
                self.file.seek(self.starts[name] + int(where[run[0]]) * size)
                self.file.write(numbers[run].tobytes())
