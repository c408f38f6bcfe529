"""Where the responses of rounds are sampled. An engine has three methods; `LocalEngine` samples in this process."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from minitrain.batch import Document, collate
from minitrain.errors import ConfigError
from minitrain.inference.sampler import Chooser, Request, Sample, Sampler
from minitrain.training.step import inference

if TYPE_CHECKING:
    from minitrain.trainer import Trainer

N_TRIED = 8  # tokens that are sampled to check an engine


class Engine(Protocol):
    """Samples responses from the policy. All ranks call `refresh` and `rest` together; each samples its own prompts."""

    def refresh(self) -> None:
        """Give the sampler the current weights of the policy."""

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
def refreshed(engine: Engine) -> Iterator[None]:
    """Return a context in which an engine samples from the current weights."""
    engine.refresh()
    try:
        yield
    finally:
        engine.rest()


class LocalEngine:
    """Samples from the model in training itself, gathered if it is sharded."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer

    def refresh(self) -> None:
        trainer = self.trainer
        self.contexts = contextlib.ExitStack()
        for context in (inference(trainer.policy), trainer.generator.gathered(), trainer.precision.autocast()):
            self.contexts.enter_context(context)

    def sample(
        self, requests: Sequence[Request], choose: Chooser, end_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> list[list[Sample]]:
        sampler = Sampler(self.trainer.policy, end_ids, self.trainer.config.rollout.num_slots)
        return sampler.sample(requests, choose, self._stopping(stop))

    def rest(self) -> None:
        self.contexts.close()

    def _stopping(self, stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
        if not stop:
            return None
        longest = max(map(len, stop)) + 8  # tokens have at least one character, but for some special ones
        tokenizer = self.trainer.template.tokenizer
        return lambda ids: any(string in tokenizer.decode(ids[-longest:]) for string in stop)


def build_engine(trainer: "Trainer") -> Engine:
    """Return the engine of a run.

    Raises:
        ConfigError: The model cannot be sampled from, or its log-probabilities differ from those of the policy.
    """
    name = type(trainer.policy.model).__name__
    if not Sampler.supports(trainer.policy):
        raise ConfigError(
            f"rollout.num_generations: {name} has layers without keys and values, from which minitrain cannot sample. "
            "Train on rollouts from files.",
            "unsupported-model",
        )
    engine = LocalEngine(trainer)
    difference = mismatch(trainer, engine)
    if difference > (1e-3 if trainer.precision.dtype == torch.float32 else 0.1):
        raise ConfigError(
            f"rollout.num_generations: log-probabilities of {name} in sampling and in training differ by "
            f"{difference:.2g} per token. Train on rollouts from files, and report this architecture.",
            "unsupported-model",
        )
    return engine


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
