"""Engines, which sample the responses of rounds: in this process, or on a vLLM server."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import torch
from torch import nn

from minitrain.batch import Document, collate
from minitrain.config.issues import ConfigIssues, check_types
from minitrain.config.schema import Config
from minitrain.errors import ConfigError
from minitrain.inference.choice import Chooser, Request, Sample, stopping
from minitrain.inference.sampler import Sampler, SlotLoop
from minitrain.model.load import DTYPES, META, build_frozen
from minitrain.model.merged import adapts_embeddings, merged_tensors
from minitrain.model.weights import allocate, state_tensors
from minitrain.training.step import Precision, inference

from .vllm import VLLMEngine, VLLMOptions

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

N_TRIED = 8  # tokens that are sampled to check an engine
MAX_MISMATCH = 0.05  # mean difference of log-probabilities between a server and the policy
MAX_CORRECTED = 0.5  # the same if it is corrected, or if the loss has no probability ratios


class Engine(Protocol):
    """Samples responses from the policy. All ranks call `refresh` and `rest` together; each samples its own prompts."""

    def refresh(self, is_updated: bool) -> None:
        """Prepare to sample from the current weights of the policy.

        Args:
            is_updated: Whether they can differ from those of the last call.
        """

    def sample(
        self, requests: Sequence[Request], choose: Chooser, end_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> list[list[Sample]]:
        """Return the responses to each request, in the order of its keys.

        Args:
            requests: The prompts.
            choose: How tokens are chosen.
            end_ids: Tokens that end a response.
            stop: Strings that end a response.
        """

    def rest(self) -> None:
        """Free what only sampling needs, until the next `refresh`."""


@contextlib.contextmanager
def refreshed(engine: Engine, is_updated: bool = True) -> Iterator[None]:
    """Return a context in which an engine samples from the current weights."""
    engine.refresh(is_updated)
    try:
        yield
    finally:
        engine.rest()


class LocalEngine:
    """Samples from the model in training itself, gathered if it is sharded."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        self.sampler = Sampler(trainer.policy, (), trainer.config.rollout.num_slots)

    def refresh(self, is_updated: bool) -> None:
        trainer = self.trainer
        self.contexts = contextlib.ExitStack()
        for context in (inference(trainer.policy), trainer.generator.gathered(), trainer.precision.autocast()):
            self.contexts.enter_context(context)

    def sample(
        self, requests: Sequence[Request], choose: Chooser, end_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> list[list[Sample]]:
        self.sampler.end_ids = set(end_ids)
        is_stopped = stopping(self.trainer.template.tokenizer, stop)
        return self.sampler.sample(requests, choose, is_stopped, lambda _: self.trainer.keep_alive())

    def rest(self) -> None:
        self.contexts.close()


class CopyEngine(LocalEngine):
    """Samples from a copy of the weights in `rollout.sampler_dtype`: plain layers, with the adapter merged.

    A decode step reads all weights, and two bytes are read in half the time of four. Neither an adapter nor sharding
    adds work to a step. The copy has memory only while it samples.
    """

    def __init__(self, trainer: "Trainer"):
        check_copy(trainer.policy.model)
        model, dtype = trainer.config.model, DTYPES[trainer.config.rollout.sampler_dtype]
        policy = build_frozen(model, trainer.tokenizer, dtype, False, DTYPES[model.master_dtype], META)
        allocate(policy, trainer.device)
        self.trainer, self.precision = trainer, Precision(dtype, trainer.device)
        self.sampler = Sampler(policy, (), trainer.config.rollout.num_slots)
        self.sizes = {parameter: parameter.untyped_storage().nbytes() for parameter in policy.parameters()}
        self._free()

    def refresh(self, is_updated: bool) -> None:
        for parameter, size in self.sizes.items():
            parameter.untyped_storage().resize_(size)
        policy, tensors = self.sampler.policy, state_tensors(self.sampler.policy.model)
        with torch.no_grad():
            for name, tensor in merged_tensors(self.trainer.policy.model, self.trainer.parallel.full_tensor):
                tensors[name].copy_(tensor)
        self.contexts = contextlib.ExitStack()
        for context in (inference(policy), self.precision.autocast()):
            self.contexts.enter_context(context)

    def rest(self) -> None:
        super().rest()
        self._free()

    def _free(self) -> None:
        for parameter in self.sizes:
            parameter.untyped_storage().resize_(0)


def build_engine(trainer: "Trainer") -> Engine:
    """Return the engine of a run.

    Raises:
        ConfigError: The engine cannot sample from the model, or its log-probabilities differ from those of the policy.
        RunError: The server of the engine fails.
    """
    options, name = trainer.config.rollout, type(trainer.policy.model).__name__
    if options.engine == "vllm":
        engine = VLLMEngine(trainer, VLLMOptions(**options.engine_args))
        corrected = trainer.loss.example_type != "rollout" or options.importance_correction != "none"
        _check_server(mismatch(trainer, engine), MAX_CORRECTED if corrected else MAX_MISMATCH, engine)
        return engine
    engine = LocalEngine(trainer) if options.sampler_dtype is None else CopyEngine(trainer)
    difference = mismatch(trainer, engine)
    dtypes = {trainer.precision.dtype, DTYPES[options.sampler_dtype or "float32"]}
    if difference > (1e-3 if dtypes == {torch.float32} else 0.1):
        raise ConfigError(
            f"rollout.num_generations: log-probabilities of {name} in sampling and in training differ by "
            f"{difference:.2g} per token. Train on rollouts from files, and report this architecture.",
            "unsupported-model",
        )
    if engine.sampler.make_loop is not SlotLoop:
        trainer.notes.append(f"rollout: the layers of {name} need the slow loop of transformers to sample responses")
    return engine


def check_copy(model: nn.Module) -> None:
    """Raise ConfigError if a copy of a model cannot have its weights."""
    if adapts_embeddings(model):
        raise ConfigError(
            "rollout.sampler_dtype: conflicts with an adapter of the embeddings or the LM head, which can be tied in "
            "the copy. Exclude these layers, or remove rollout.sampler_dtype.",
            "conflict",
        )


def _check_server(difference: float, limit: float, engine: VLLMEngine) -> None:
    if difference > limit:
        correct = " or set rollout.importance_correction" * (limit == MAX_MISMATCH)
        raise ConfigError(
            f"rollout.engine: log-probabilities of {engine.options.url} and of the policy differ by {difference:.2g} "
            f"per token, more than {limit}. Serve the model of model.name_or_path with "
            f"--logprobs-mode processed_logprobs,{correct}, or use rollout.engine=local.",
            "mismatch",
        )


def check_engine(config: Config, issues: ConfigIssues) -> None:
    """Add the problems of `rollout.engine`, `rollout.engine_args` and `rollout.sampler_dtype` to `issues`."""
    options, n_virtual_tokens = config.rollout, config.soft_prompt.num_virtual_tokens
    key = "rollout.engine_args"
    if options.sampler_dtype is not None:
        _check_sampler_dtype(config, issues)
    if options.engine == "local":
        if options.engine_args:
            issues.add(key, "no-effect", "has no effect: it needs rollout.engine=vllm.")
        return
    if n_virtual_tokens:
        message = "vllm conflicts with a soft prompt, which the server does not have. Use local."
        issues.add("rollout.engine", "conflict", message, "soft_prompt.num_virtual_tokens")
    values = check_types(VLLMOptions, options.engine_args, f"{key}.", issues)
    url = values.get("url", "")
    if url and urlsplit(url).scheme not in ("http", "https"):
        issues.add(f"{key}.url", "invalid-value", f"must begin with http:// or https://, got {url!r}.")
    folder = values.get("weights_dir")
    if folder and not Path(folder).is_dir():
        issues.add(f"{key}.weights_dir", "not-found", f"is not a folder, got {folder!r}. Create it.")


def _check_sampler_dtype(config: Config, issues: ConfigIssues) -> None:
    key = "rollout.sampler_dtype"
    if config.rollout.engine == "vllm":
        message = "has no effect with rollout.engine=vllm, whose server has weights of its own. Remove it."
        issues.add(key, "no-effect", message, "rollout.engine")
    if config.soft_prompt.num_virtual_tokens:
        message = "conflicts with a soft prompt, which the copy of the weights does not have. Remove it."
        issues.add(key, "conflict", message, "soft_prompt.num_virtual_tokens")
    if config.model.quantization != "none":
        message = f"conflicts with model.quantization={config.model.quantization}: the copy would not be quantized."
        issues.add(key, "conflict", f"{message} Remove it.", "model.quantization")


def mismatch(trainer: "Trainer", engine: Engine) -> float:
    """Return the mean difference of log-probabilities between an engine and the policy, for a few sampled tokens."""
    policy, temperature = trainer.policy, trainer.config.rollout.temperature
    generator = torch.Generator().manual_seed(0)
    size = min(policy.model.config.get_text_config().vocab_size, len(trainer.tokenizer))
    prompts = [torch.randint(size, (n,), generator=generator).tolist() for n in (5, 9)]
    with refreshed(engine):
        requests = [Request(prompt, [(0,)], N_TRIED) for prompt in prompts]
        samples = engine.sample(requests, Chooser(temperature), [])
    differences = []
    with inference(policy), trainer.precision.autocast():
        for prompt, (sample,) in zip(prompts, samples, strict=True):
            mask = torch.tensor([0] * len(prompt) + [1] * len(sample.ids), dtype=torch.uint8)
            document = Document(torch.tensor(prompt + sample.ids, dtype=torch.int32), mask)
            batch = collate([[document]], 0).to(trainer.device)
            logps = policy(batch, temperature=temperature).logps.float().cpu()  # [T]
            differences.append(float((logps - torch.tensor(sample.logps)).abs().mean()))
    trainer.parallel.reshard(policy)
    return trainer.parallel.max(max(differences))
