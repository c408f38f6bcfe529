"""The loop. It knows no loss, no data set, no model class and no number of devices."""

import functools
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minitrain.config.schedules import lr_factor
from minitrain.config.schema import Config
from minitrain.distributed.parallel import make_parallel
from minitrain.inference.evaluation import evaluate_all
from minitrain.inference.generate import Generator, Messages, Sampling
from minitrain.model.load import DTYPES, load_policy
from minitrain.model.save import check_saving, set_end_tokens
from minitrain.model.vocabulary import describe_new_tokens
from minitrain.tools.preflight.load import check_python_config
from minitrain.training.agreement import check_same_inputs, check_same_options
from minitrain.training.aux_models import build_aux_models
from minitrain.training.checkpoint import restore_rng
from minitrain.training.evaluation import run_evaluation, should_evaluate
from minitrain.training.failpoints import failpoint
from minitrain.training.metric_logger import MetricLogger
from minitrain.training.optim import build_optimizer, warmup_steps
from minitrain.training.precision import Precision
from minitrain.training.reporting import log_train, report_start, start_window, warn
from minitrain.training.run_dir import RunFolder
from minitrain.training.save_schedule import SaveSchedule
from minitrain.training.saving import restore_checkpoint, save_checkpoint, save_if_due, save_model
from minitrain.training.setup import make_loader, prepare_policy, read_data
from minitrain.training.signals import capture_signals
from minitrain.training.step import StepOutput, forward_backward, optim_step

from .batch import Batch
from .errors import ConfigError, RunError
from .losses import Loss, create_loss, describe_loss

HOOKS = ("on_train_begin", "on_step_end", "on_eval_end", "on_save", "on_train_end")


class Trainer:
    """Trains a model as a `Config` says.

    Hooks are plain functions that get the trainer: ``Trainer(config, on_step_end=lambda t: print(t.step))``.
    They may read everything and set `trainer.should_stop`. With several ranks each calls them.

    Attributes that hooks read: step, updates, consumed, indices (of the examples of the last step), config, policy,
    optimizer, parallel, train_metrics (of the last log step), eval_metrics (of the last evaluation).
    """

    logger: MetricLogger | None = None  # while it trains

    def __init__(self, config: Config, loss: Loss | None = None, **hooks: Callable[["Trainer"], None]):
        """Reads the data, then the model. Raises ConfigError, DataError or RunError."""
        unknown = set(hooks) - set(HOOKS)
        if unknown:
            raise ConfigError(
                f"there is no hook {', '.join(sorted(unknown))}; there are {', '.join(HOOKS)}", "not-a-choice"
            )
        config = check_python_config(config, None if loss is None else describe_loss(loss))
        self.config, self.hooks = config, hooks
        self.loss = loss or create_loss(**config.loss)
        self.parallel = make_parallel(config)
        self.device = self.parallel.device
        with self.parallel.naming_failures():
            self._load()

        self.step = 0  # optimizer steps tried
        self.updates = 0  # optimizer steps taken; those with a non-finite gradient are not
        self.consumed = 0  # examples seen, over all ranks
        self.indices: list[int] = []  # the examples of the last step
        self.checkpoint: Path | None = None
        self.saved_progress: dict = {}  # of the newest checkpoint in the run folder
        n_bytes = 3 * sum(p.numel() * p.element_size() for p in self.parameters)  # with two moments
        self.save_schedule = SaveSchedule(config.save_every_steps, n_bytes, self.parallel)
        self.step_output: StepOutput | None = None  # of the gradients that no optimizer step has used yet
        self.bad_steps = 0  # non-finite ones in a row
        self.evaluated_step: int | None = None
        self.best: float | None = None
        self.evals_without_improvement = 0
        self.train_metrics: dict[str, float] = {}
        self.eval_metrics: dict[str, float] = {}
        self.should_stop = False
        self.signal: int | None = None  # what all ranks agreed to stop for
        self._received: int | None = None  # what reached this rank, which the others do not know yet
        start_window(self)

    def _load(self) -> None:
        """Read the data and the model, and try what training needs. An error of one rank ends them all."""
        config = self.config
        check_same_options(config, self.parallel)
        self.run = RunFolder(config, self.parallel)
        self.precision = Precision(DTYPES[config.model.policy_dtype], self.device)

        torch.manual_seed(config.seed)
        torch.autograd.set_detect_anomaly(config.debug)
        with self.parallel.local_rank0_first():  # the first process of a machine tokenises and downloads
            self.template, data = read_data(config, self.loss)
            self.tokenizer = self.template.tokenizer
            ends = {"outputs": self.loss.head_labels, "value_head": "values" in self.loss.requires}
            policy, weights = load_policy(config, self.tokenizer, self.device, self.parallel.loads_shards, **ends)
            failpoint("load.policy")
        check_same_inputs(config, data, self.parallel)
        new = describe_new_tokens(policy.model, self.tokenizer)
        self.notes = [*data.notes, *([f"new tokens: {new}"] if new else [])]
        self.warnings = data.warnings
        share = {"rank": self.parallel.rank, "world_size": self.parallel.world_size}
        self.train_loader = make_loader(data.train, config, self.tokenizer, policy, **share)
        self.eval_loader = make_loader(data.eval, config, self.tokenizer, policy, **share) if data.eval else None
        self.total_steps = self.train_loader.total_steps
        self.warmup = warmup_steps(config, self.total_steps)
        loaders = list(filter(None, (self.train_loader, self.eval_loader)))
        self.policy = prepare_policy(policy, weights, config, self.parallel, self.precision, self.loss.dropout)
        failpoint("load.weights")
        self.models = build_aux_models(
            self.loss, config, self.policy, self.tokenizer, self.parallel, self.precision, loaders
        )
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.policy, config)
        set_end_tokens(policy.model, self.template.end_ids())
        check_saving(policy.model, self.tokenizer)
        self.generator = Generator(
            policy.model, self.template, lambda: self.parallel.unsharded(self.policy), policy.position_limit
        )
        torch.manual_seed(config.seed + self.parallel.rank)  # dropout differs by rank

    # ---------------------------------------------------------------------------------------------- the loop

    def train(self) -> dict[str, float]:
        """Runs to the end, to early stopping, or to a signal; returns the metrics of the last evaluation.

        After SIGINT, SIGTERM or SIGUSR1 it writes a checkpoint, and `self.signal` holds the signal.
        """
        with self.parallel.monitor_ranks(), self.run.locked():
            if finished := self.run.finished(self.total_steps):
                if self.parallel.rank == 0 and not self.config.quiet:
                    print(finished)
                return {}
            self.checkpoint = self.run.find_checkpoint()
            if self.checkpoint is not None:
                restore_checkpoint(self, self.checkpoint)
            with capture_signals(functools.partial(setattr, self, "_received")):
                logged = self.run.start(None if self.checkpoint is None else self.step, should_evaluate(self))
                self.logger = MetricLogger(
                    self.config, self.run.path, self.run.settings(), logged, speaks=self.parallel.rank == 0
                )
                self.logger.warning(*self.run.messages)
                try:
                    self._run()
                finally:
                    self.logger.close()
        return self.eval_metrics

    def _run(self) -> None:
        self._begin()
        self._loop()
        if self.signal is None:
            self._finish()
        if self.signal is not None:
            save_checkpoint(self)
            name = signal.Signals(self.signal).name
            self.logger.warning(f"stopped by {name} at step {self.step}; the same command goes on from there")
        self.run.finish_saving()
        failpoint("train.end")
        self._stopping()  # a signal that came while the final model was saved decides the exit code
        self.call_hook("on_train_end")

    def _loop(self) -> None:
        self.logger.start_bar(self.total_steps, self.step)
        self.save_schedule.start()
        start_window(self)
        for indices, batches in self.train_loader.steps(self.consumed):
            if self._stopping() or self.step >= self.total_steps:
                break
            self.parallel.set_status(f"step {self.step + 1}")
            output = self.forward_backward(batches)
            self.grad_norm = self.optim_step()
            for batch, computed in zip(batches, output.outputs):
                self.window.count(batch)
                self.totals.add(computed)
            self.consumed += len(indices)
            self.indices = indices
            tokens = functools.partial(self.train_loader.examples.digest, indices)
            self.logger.log_step(self.step, tokens, float(output.loss), self.grad_norm)
            self.logger.advance()
            self._after_step()

    def forward_backward(self, batches: Sequence[Batch]) -> StepOutput:
        """Add the gradients of one optimizer step: summed over micro-batches and ranks, then divided once.

        Args:
            batches: The micro-batches of this rank, such as `train_loader.steps()` yields. All ranks call it.
        """
        self.step_output = forward_backward(self.loss, batches, self.models, self.parallel, self.precision)
        return self.step_output

    def optim_step(self) -> float:
        """Clip the gradients, update the weights at the scheduled learning rate, and return the gradient norm.

        A step with a non-finite loss or gradient leaves weights, moments and schedule alone.

        Raises:
            RunError: After `max_bad_steps` such steps in a row.
        """
        if self.step_output is None:
            raise RunError("optim_step: there are no gradients. Call forward_backward first.", "usage")
        update = optim_step(
            self.optimizer,
            self.parameters,
            self.step_output.loss,
            self.lr,
            self.config.max_grad_norm,
            self.parallel,
            self.precision,
        )
        self.step_output = None
        self.step += 1
        if update.taken:
            self.updates += 1
            self.bad_steps = 0
        elif not update.overflowed:
            self._count_bad_step()
        return update.grad_norm

    def _count_bad_step(self) -> None:
        self.bad_steps += 1
        warn(self, f"step {self.step}: loss or gradient is not finite; the step is skipped")
        if self.bad_steps >= self.config.max_bad_steps:
            raise RunError(
                f"{self.bad_steps} steps in a row (up to step {self.step}) had a non-finite loss or gradient; "
                "the weights are those before them. Lower lr, look at the data, or find the place with debug=true.",
                "not-finite",
            )

    @property
    def lr(self) -> float:
        """The learning rate of the next update. It follows the updates taken, not the steps tried."""
        name, decay = self.config.lr_scheduler, self.config.lr_decay_ratio
        return self.config.lr * lr_factor(self.updates, self.total_steps, self.warmup, name, decay)

    def _after_step(self) -> None:
        config, last = self.config, self.step == self.total_steps
        if self.step % config.log_every_steps == 0 or last:
            log_train(self)
        self.call_hook("on_step_end")
        self.run.finish_saving(wait=False)
        if should_evaluate(self):
            run_evaluation(self)
        if config.save_models_every_steps and self.step % config.save_models_every_steps == 0 and not last:
            save_model(self, self.run.model(self.step))
        save_if_due(self)
        failpoint("step.end")

    def _stopping(self) -> bool:
        """Whether to stop, agreed on by all ranks; a signal that one of them received becomes everyone's.

        Nothing else sets `signal`, so that every rank takes the same branch before a collective.
        """
        code = int(self.parallel.max(self._received or int(self.should_stop)))
        self.signal = code if code > 1 else self.signal
        return code > 0

    def is_interrupted(self) -> bool:
        """Return whether a signal has stopped the training. All ranks call it."""
        return self._stopping() and self.signal is not None

    # ------------------------------------------------------------------------------------------ begin and end

    def _begin(self) -> None:
        report_start(self)
        self.call_hook("on_train_begin")
        failpoint("train.begin")
        if should_evaluate(self):
            run_evaluation(self)
        if self.checkpoint is not None:
            restore_rng(self.checkpoint, self.parallel)  # last, so that nothing draws from it before the first step

    def _finish(self) -> None:
        if self.evaluated_step != self.step:
            run_evaluation(self)
        if self.signal is not None:
            return
        save_model(self, self.run.final)
        self.run.finish(self.step, self.total_steps)
        if self.save_schedule.count:
            self.logger.info(self.save_schedule.summary())
        self.logger.info(f"done: {self.run.final}" + (f", best: {self.run.best}" if self.run.best.exists() else ""))

    def call_hook(self, hook: str) -> None:
        """Call the function given as `hook`, if any."""
        if hook in self.hooks:
            self.hooks[hook](self)

    # --------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> dict[str, float]:
        """Metrics on the evaluation data; {} without any, or when a signal came."""
        return {} if self.eval_loader is None else evaluate_all(self, self.eval_loader)

    # --------------------------------------------------------------------------------------- using the model

    def predict(self, prompts: list[str | Messages], max_new_tokens: int = 256, temperature: float = 0.0) -> list[str]:
        """Answers to prompts, each a text or a list of messages, from the model as it is now."""
        conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        with self.precision.autocast():
            return self.generator.answer_messages(conversations, Sampling(max_new_tokens, temperature))

    def chat(self, messages: Messages, **kwargs) -> str:
        """The answer to one conversation."""
        return self.predict([messages], **kwargs)[0]
