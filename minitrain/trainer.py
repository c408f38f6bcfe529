"""The training loop. It does not depend on the loss, the dataset, the model class or the number of devices."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minitrain.config.schedules import lr_factor
from minitrain.config.schema import Config
from minitrain.distributed.parallel import make_parallel
from minitrain.inference.evaluation import evaluate_all, load_rows
from minitrain.inference.generate import Generator, Messages, Sampling
from minitrain.rl.rounds import sample_rounds
from minitrain.tools.preflight.python import MAKE, config_with, loss_object
from minitrain.training.after_step import (
    after_step,
    begin,
    count_bad_step,
    finish,
    is_late,
    report_stop,
    should_evaluate,
    start_window,
)
from minitrain.training.aux_models import move_reference
from minitrain.training.callbacks import Hooks, collect_hooks
from minitrain.training.determinism import check_repeatable, deterministic_algorithms
from minitrain.training.drift import drift_metrics
from minitrain.training.failpoints import failpoint
from minitrain.training.learning_rate import with_defaults
from minitrain.training.loading import load_parts
from minitrain.training.metric_logger import MetricLogger
from minitrain.training.optimizers import set_lr
from minitrain.training.saving import SaveSchedule, check_target, restore_checkpoint, save_checkpoint, save_model
from minitrain.training.signals import Interrupted, announce, capture_signals
from minitrain.training.step import StepOutput, forward_backward, optim_step
from minitrain.training.time_limit import TIMEOUT, TimeLimit

from .batch import Batch
from .errors import ConfigError, RunError
from .losses import Loss, Models, create_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from minitrain.data.loader import MicrobatchLoader
    from minitrain.model.policy import Policy
    from minitrain.training.run_dir import RunDir

ARGUMENTS = (*MAKE, "loss", "callbacks")  # besides the config and hooks


class Trainer:
    """Train a model as a config describes.

    >>> Trainer("config.yml").train()
    >>> Trainer({"model": {"name_or_path": "tiny"}, "n_steps": 10}, train_dataset=rows).train()

    Hooks are functions that receive the trainer: `on_train_begin`, `on_step_end`, `on_eval_end`, `on_save` and
    `on_train_end`. They can read all attributes, and set `should_stop`. Every rank calls them.

    Args:
        config: A `Config`, the path of a YAML file, or a dict of its keys.
        model: A loaded transformers model, which is trained in place. It replaces `model.name_or_path`.
        tokenizer: Its tokenizer.
        train_dataset: Data rows to train on, as dicts in any format of a data file: a list or a datasets.Dataset. It
            replaces `datasets`.
        eval_dataset: Data rows to evaluate on. It replaces `eval_datasets`.
        loss: A loss object or the name of a loss, if the config has none.
        optimizer: A function that receives the list of trained parameters and returns the optimizer. The lr of each
            parameter group is its peak.
        callbacks: Objects with methods named like hooks.
        hooks: A function, or a list of functions, for each hook: ``on_step_end=lambda t: print(t.step)``.

    Attributes:
        step: Optimizer steps so far.
        updates: Updates so far: optimizer steps without those skipped for a non-finite gradient.
        consumed: Examples seen by all ranks.
        indices: Indices of the examples of the last step.
        total_steps: Optimizer steps of the full run.
        train_metrics: Metrics of the last log line.
        eval_metrics: Metrics of the last evaluation.
        should_stop: Set to True to end the training after this step.
        config, loss, policy, optimizer, parallel, train_loader: The parts of the run.
    """

    run: "RunDir"
    tokenizer: "PreTrainedTokenizerBase"
    policy: "Policy"
    models: Models
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    train_loader: "MicrobatchLoader"
    eval_loader: "MicrobatchLoader | None"
    retention_loader: "MicrobatchLoader | None"
    total_steps: int
    grad_norm: float
    logger: MetricLogger | None = None  # during `train`

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | Path,
        *,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        loss: Loss | str | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
        callbacks: Iterable[Any] = (),
        **hooks: "Unpack[Hooks]",
    ):
        """Load the data, then the model.

        Raises:
            ConfigError: An option or argument is invalid; the error lists all invalid options.
            DataError: A data row cannot be used.
            RunError: The run directory cannot be used.
        """
        self.hooks = collect_hooks(callbacks, hooks, ARGUMENTS)
        loss = loss_object(loss)
        given = {"model": model, "tokenizer": tokenizer, "optimizer": optimizer}
        given |= {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        config, self._objects = config_with(config, loss, given)
        self.loss = loss or create_loss(**config.loss)
        self.time_limit = TimeLimit(config.max_minutes)
        self.parallel = make_parallel(config)
        self.device = self.parallel.device
        self.config = with_defaults(config, self.device, self.loss)
        self.signal: int | None = None  # the signal, or TIMEOUT, that all ranks agreed to stop for
        self._received: int | None = None  # a signal that only this rank may have received
        with self.parallel.naming_failures(), deterministic_algorithms(self.config.deterministic):
            load_parts(self)
            self.generator = Generator(self.policy.model, self.template, self.policy, self.parallel)
            if self.loss.online:
                sample_rounds(self)

        self.step = self.updates = self.consumed = 0
        self.indices: list[int] = []
        self.checkpoint: Path | None = None
        self.saved_progress: dict = {}  # state of the newest checkpoint in the run directory
        n_bytes = 3 * sum(p.numel() * p.element_size() for p in self.parameters)  # weights and two moments
        self.save_schedule = SaveSchedule(self.config.save_every_steps, n_bytes, self.parallel)
        self.step_output: StepOutput | None = None  # None after the optimizer step has used the gradients
        self.bad_steps = 0  # consecutive steps with a non-finite loss or gradient
        self.evaluated_step: int | None = None
        self.best: float | None = None
        self.evals_without_improvement = 0
        self.train_metrics: dict[str, float] = {}
        self.eval_metrics: dict[str, float] = {}
        self.should_stop = False
        self.is_repeatable = not self.config.deterministic  # or checked
        start_window(self)

    def __repr__(self) -> str:
        name, model = self.config.exp_name, type(self.generator.model).__name__
        return f"<Trainer {name!r}: {model}, loss {self.config.loss['name']}, step {self.step} of {self.total_steps}>"

    # ---------------------------------------------------------------------------------------------- the loop

    def train(self) -> dict[str, float]:
        """Train to the end, to early stopping, a signal or `max_minutes`. Return the metrics of the last evaluation.

        After SIGINT, SIGTERM or SIGUSR1, or before `max_minutes` are over, write a checkpoint and set `self.signal`.
        """
        self.time_limit.start_training()
        deterministic = deterministic_algorithms(self.config.deterministic)
        with self.parallel.monitor_ranks(), self.run.locked(), deterministic:
            if finished := self.run.finished(self.total_steps):
                if self.parallel.rank == 0 and not self.config.quiet:
                    print(finished)
                return {}
            self.signal = self._received = None  # of a call before
            self.checkpoint = self.run.find_checkpoint()
            if self.checkpoint is not None:
                restore_checkpoint(self, self.checkpoint)
            with capture_signals(self._receive):
                logged = self.run.start(None if self.checkpoint is None else self.step, should_evaluate(self))
                self.logger = MetricLogger(
                    self.config, self.run.path, self.run.settings(), logged, enabled=self.parallel.rank == 0
                )
                self.logger.warning(*self.run.messages)
                try:
                    self._run()
                finally:
                    self.logger.close()
        return self.eval_metrics

    def _run(self) -> None:
        resumed_from = self.step, self.evaluated_step
        begin(self)
        self._loop()
        if self.signal is None:
            finish(self)
        if self.signal is not None:
            save_checkpoint(self)
            report_stop(self, *resumed_from)
        self.run.finish_saving()
        failpoint("train.end")
        self._stopping()  # a signal during the save of the final model sets the exit code
        self.call_hook("on_train_end")

    def _loop(self) -> None:
        self.logger.start_bar(self.total_steps, self.step)
        self.save_schedule.start()
        self.time_limit.start_loop()
        start_window(self)
        with contextlib.closing(self.train_loader.steps(self.consumed)) as steps:
            for indices, batches in steps:
                self.time_limit.start_step()
                if self._stopping(is_late(self, next_step=True)) or self.step >= self.total_steps:
                    break
                self._step(indices, batches)

    def _step(self, indices: list[int], batches: Sequence[Batch]) -> None:
        self.parallel.set_status(f"step {self.step + 1}")
        if not self.is_repeatable:
            check_repeatable(self, batches)
            self.is_repeatable = True
        output = self.forward_backward(batches)
        self.grad_norm = self.optim_step()
        for batch, computed in zip(batches, output.outputs):
            self.window.update(batch)
            self.totals.add(computed)
        self.totals.add_load(output.load)
        self.consumed += len(indices)
        self.indices = indices
        tokens = functools.partial(self.train_loader.examples.digest, indices)
        self.logger.log_step(self.step, tokens, self.step_loss, self.grad_norm)
        self.logger.advance()
        after_step(self)

    def forward_backward(self, batches: Sequence[Batch]) -> StepOutput:
        """Add the gradients of one optimizer step: summed over micro-batches and ranks, then divided once.

        Args:
            batches: The micro-batches of this rank, as from `train_loader.steps()`. Every rank calls this method.
        """
        if self.config.optimizer_in_backward:
            if len(batches) > 1:
                raise ConfigError(
                    f"optimizer_in_backward: conflicts with {len(batches)} micro-batches, since each would update. "
                    "Set gradient_accumulation_steps=1.",
                    "conflict",
                )
            set_lr(self.optimizer, self.lr)
        self.step_output = forward_backward(self.loss, batches, self.models, self.parallel, self.precision)
        return self.step_output

    def optim_step(self) -> float:
        """Clip the gradients, update the weights at the scheduled learning rate, and return the gradient norm.

        A step with a non-finite loss or gradient does not change weights, moments or schedule.

        Raises:
            RunError: `max_bad_steps` consecutive steps were non-finite, or there are no gradients.
        """
        if self.step_output is None:
            raise RunError("optim_step: gradients are missing. Call forward_backward first.", "usage")
        loss, max_norm = self.step_output.loss, self.config.max_grad_norm
        update = optim_step(self.optimizer, self.parameters, loss, self.lr, max_norm, self.parallel, self.precision)
        self.step_loss = update.loss
        self.step_output = None
        self.step += 1
        if update.taken:
            self.updates += 1
            self.bad_steps = 0
            move_reference(self.loss, self.models, self.updates)
        elif not update.overflowed:
            count_bad_step(self)
        return update.grad_norm

    @property
    def lr(self) -> float:
        """Return the learning rate of the next update. The schedule counts updates, not skipped steps."""
        c = self.config
        schedule = c.lr_scheduler, c.lr_decay_ratio, c.lr_scheduler_args, c.lr
        return c.lr * lr_factor(self.updates, self.total_steps, self.warmup, *schedule)

    def _stopping(self, time_is_up: bool = False) -> bool:
        """Return whether to stop, the same on all ranks, and share what one rank received or measured.

        Only this method sets `signal`, so that every rank takes the same branch before a collective.
        """
        own = self._received or (TIMEOUT if time_is_up else int(self.should_stop))
        code = int(self.parallel.max(own))
        self.signal = code if code > 1 else self.signal
        return code > 0

    def _receive(self, number: int) -> None:
        if self._received is None and self.parallel.rank == 0:
            announce(number)
        self._received = number

    def keep_alive(self, seconds: float = 0.0) -> None:
        """Report progress of this rank, as `parallel.keep_alive` does. Raise Interrupted if it received a signal."""
        self.parallel.keep_alive(seconds)
        if self._received is not None:
            raise Interrupted

    def is_interrupted(self) -> bool:
        """Return whether a signal or `max_minutes` has stopped the training. Every rank must call it."""
        return self._stopping(is_late(self)) and self.signal is not None

    def call_hook(self, hook: str) -> None:
        """Call the functions of a hook."""
        for function in self.hooks[hook]:
            function(self)

    # --------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, dataset: Iterable[Mapping[str, Any]] | None = None) -> dict[str, float]:
        """Return the metrics on the evaluation data; {} without any, or after a signal.

        Args:
            dataset: Data rows to evaluate on instead.
        """
        loader = self.eval_loader if dataset is None else load_rows(self, dataset)
        if loader is None:
            return {}
        metrics = self.train_loader.evaluate(loader) if self.loss.online else evaluate_all(self, loader)
        return metrics and metrics | drift_metrics(self, loader)

    # --------------------------------------------------------------------------------------- using the model

    def save_model(self, path: str | Path) -> None:
        """Save the current model with tokenizer and model card, in the format of `from_pretrained`."""
        check_target(Path(path))
        save_model(self, Path(path))

    def generate(
        self,
        prompts: Sequence[str | Messages],
        sampling: Sampling | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Return the model's responses to prompts.

        Args:
            prompts: Strings, or conversations as lists of messages.
            sampling: Sampling options; greedy by default.
            tools: Functions that the model may call, as in OpenAI's format.
            chat_template_kwargs: Arguments of the chat template instead of those of the config.
        """
        with self.precision.autocast():
            return self.generator.generate(prompts, sampling, tools=tools, chat_template_kwargs=chat_template_kwargs)

    def predict(
        self, prompts: Sequence[str | Messages], max_new_tokens: int = 256, temperature: float = 0.0
    ) -> list[str]:
        """Return responses to prompts; see `generate`."""
        return self.generate(prompts, Sampling(max_new_tokens, temperature))

    def chat(
        self,
        messages: Messages,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the response to one conversation; see `generate`."""
        sampling = Sampling(max_new_tokens, temperature)
        return self.generate([messages], sampling, tools, chat_template_kwargs)[0]
