"""Primitives for a loop of your own: gradients, updates, samples and checkpoints of one model."""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from minitrain import __version__
from minitrain.config.schema import Config
from minitrain.config.sections import DatasetConfig
from minitrain.data.loader import MicrobatchLoader, load_data
from minitrain.data.rows import rows_object
from minitrain.data.template import make_template
from minitrain.distributed.parallel import make_parallel
from minitrain.inference.generate import Generator, Messages, Sampling
from minitrain.model.fingerprint import model_fingerprint
from minitrain.model.load import DTYPES, build_policy, load_tokenizer
from minitrain.model.save import check_saving, set_end_tokens
from minitrain.tools.preflight.python import loss_object, session_config
from minitrain.training.atomic_dir import verify
from minitrain.training.aux_models import build_aux_models, move_reference, moving_reference, reference_kind
from minitrain.training.checkpoint import Save, load_checkpoint, restore_rng
from minitrain.training.learning_rate import with_defaults
from minitrain.training.optim import build_optimizer
from minitrain.training.saving import check_target, write_model
from minitrain.training.setup import make_loader, prepare_policy
from minitrain.training.step import Precision, StepOutput, Update, evaluate, forward_backward, optim_step

from .errors import ConfigError, RunDirError, RunError
from .losses import Loss, add_features, create_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass
class SampledResponse:
    """A response of `Session.sample`.

    Attributes:
        text: The response, without special tokens.
        prompt_ids: Token ids of the prompt.
        ids: Token ids of the response, with the end token.
        logps: Log-probability of each token of the response at the sampling temperature.
        ended: Whether it ended by itself, not by the limit of tokens.
    """

    text: str
    prompt_ids: list[int]
    ids: list[int]
    logps: list[float]
    ended: bool

    def rollout(self, reward: float, **columns: Any) -> dict[str, Any]:
        """Return a data row for the losses `policy` and `value`, with more columns if you give some."""
        row = {"prompt_ids": self.prompt_ids, "response_ids": self.ids, "old_logps": self.logps, "reward": reward}
        return row | {"truncated": not self.ended} | columns


class Session:
    """Train and sample one model from a loop of your own.

    >>> session = Session({"model": {"name_or_path": "tiny"}, "lora": {"rank": 8}, "lr": 1e-3})
    >>> for rows in batches:
    ...     print(session.forward_backward(rows).loss)
    ...     session.optim_step()
    >>> session.sample(["2 + 3 ="])[0][0].text

    Rows have any format of a data file, and are tokenized as by `Trainer`. Each rank of `torchrun` makes the same calls
    with the same arguments. Options of the data, the schedule, evaluations and trackers have no effect and are refused.

    Args:
        config: A `Config`, the path of a YAML file, or a dict of its keys.
        model: A loaded transformers model, which is trained in place. It replaces `model.name_or_path`.
        tokenizer: Its tokenizer.
        loss: A loss object or the name of a loss, if the config has none.
        optimizer: A function that receives the list of trained parameters and returns the optimizer.

    Attributes:
        step: Calls of `optim_step` so far.
        updates: Those that updated the weights.
        config, loss, policy, tokenizer, optimizer, parameters, parallel: The parts of the session.
    """

    def __init__(
        self,
        config: Config | Mapping[str, Any] | str | Path,
        *,
        model: "PreTrainedModel | None" = None,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        loss: Loss | str | None = None,
        optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ):
        """Load the model.

        Raises:
            ConfigError: An option or argument is invalid, or has no effect.
        """
        loss = loss_object(loss)
        given = {"model": model, "tokenizer": tokenizer, "optimizer": optimizer}
        config, self._objects = session_config(config, loss, given)
        self.loss = loss or create_loss(**config.loss)
        self.parallel = make_parallel(config)
        self.config = with_defaults(config, self.parallel.device, self.loss)
        with self.parallel.naming_failures():
            self._load()
        self.step = self.updates = 0
        self._losses: list[Tensor] = []  # of the calls of `forward_backward` since the last update

    def _load(self) -> None:
        """Load the parts in the order of `Trainer`, so that the same seed gives the same weights."""
        config, loss, parallel = self.config, self.loss, self.parallel
        loss.set_online(config)
        if "reference" in loss.requires and reference_kind(loss, config) == "precomputed":
            message = "loss.reference: precomputed needs all examples in advance. Set model or adapter."
            raise ConfigError(message, "conflict")
        self.precision = Precision(DTYPES[config.model.policy_dtype], parallel.device)
        torch.manual_seed(config.seed)
        torch.autograd.set_detect_anomaly(config.debug)
        with parallel.local_rank0_first():
            self.tokenizer = load_tokenizer(config.model, scores=loss.head_labels is not None)
            self.template = make_template(self.tokenizer, config, loss.example_type)
            heads = loss.head_labels, "values" in loss.requires
            policy, weights = build_policy(config, self.tokenizer, parallel.device, parallel.loads_shards, *heads)
        set_end_tokens(policy.model, self.template.end_ids())
        check_saving(policy.model, self.tokenizer)
        self.policy = prepare_policy(policy, weights, config, parallel, self.precision, loss.dropout)
        self.models = build_aux_models(loss, config, self.policy, self.tokenizer, parallel, self.precision, [])
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.policy, config)
        self.generator = Generator(self.policy.model, self.template, self.policy, parallel)
        torch.manual_seed(config.seed + parallel.rank)  # dropout differs by rank

    def __repr__(self) -> str:
        return f"<Session: {type(self.policy.model).__name__}, loss {self.loss.name}, step {self.step}>"

    def forward_backward(self, examples: Iterable[Mapping[str, Any]], loss: Loss | str | None = None) -> StepOutput:
        """Compute the mean loss of examples, and add its gradients to those since the last `optim_step`.

        Args:
            examples: Data rows. Groups and whitening of advantages are those of this call.
            loss: Another loss than that of the session, which needs no other models or heads.

        Raises:
            ConfigError: The loss needs what the session does not have.
            DataError: A row cannot be used.
        """
        loss = self._usable(loss)
        loader = self._loader(examples, loss)
        batches = loader.micro_batches(np.arange(len(loader.examples)))
        output = forward_backward(loss, batches, self.models, self.parallel, self.precision)
        self._losses.append(output.loss)
        return output

    def optim_step(self, lr: float | None = None) -> Update:
        """Clip the gradients, update the weights, and clear the gradients.

        A non-finite loss or gradient changes nothing; `taken` of the result is then False.

        Args:
            lr: Learning rate of this update (default: the option `lr`, by the loss and the adapter if it is not set).

        Raises:
            RunError: There are no gradients.
        """
        if not self._losses:
            raise RunError("optim_step: gradients are missing. Call forward_backward first.", "usage")
        loss, lr = torch.stack(self._losses).sum(), self.config.lr if lr is None else lr
        rest = self.config.max_grad_norm, self.parallel, self.precision
        update = optim_step(self.optimizer, self.parameters, loss, lr, *rest)
        self._losses = []
        self.step += 1
        if update.taken:
            self.updates += 1
            move_reference(self.loss, self.models, self.updates)
        return update

    def sample(
        self, prompts: Sequence[str | Messages], num_samples: int = 1, sampling: Sampling | None = None
    ) -> list[list[SampledResponse]]:
        """Return responses of the current model to each prompt.

        Args:
            prompts: Strings, or conversations as lists of messages.
            num_samples: Responses to each prompt.
            sampling: Sampling options (default: temperature 1).

        Raises:
            ConfigError: An argument is invalid, or its temperature is not that of the loss of rollouts.
            DataError: A prompt cannot be used.
        """
        ids = self.generator.encode_prompts(prompts, sampling)
        sampling = sampling or Sampling(temperature=1.0)
        if sampling.temperature not in (0, self.loss.temperature) and self.loss.example_type == "rollout":
            raise ConfigError(
                f"sampling: expected loss.temperature={self.loss.temperature:g}, at which the loss computes "
                f"log-probabilities, or 0, got temperature={sampling.temperature:g}. Set both to the same.",
                "mismatch",
            )
        with self.precision.autocast():
            samples = self.generator.sample(ids, sampling, num_samples, self.config.eval_batch_size)
        parse = self.generator.parser.parse
        return [
            [SampledResponse(parse(prompt, s.ids).text, prompt, s.ids, s.logps, s.ended) for s in of_prompt]
            for prompt, of_prompt in zip(ids, samples, strict=True)
        ]

    def evaluate(self, examples: Iterable[Mapping[str, Any]], loss: Loss | str | None = None) -> dict[str, float]:
        """Return the mean loss and metrics on data rows, without gradients."""
        loss = self._usable(loss)
        return evaluate(loss, self._loader(examples, loss).eval_batches, self.models, self.parallel, self.precision)

    def save(self, path: str | Path) -> None:
        """Save trained weights, optimizer and random state in a folder, from which `load` resumes exactly."""
        state = {"step": self.step, "precision": self.precision.state_dict(), "n_sampled": self.generator.calls}
        state |= {"model": model_fingerprint(self.config.model), "updates": self.updates}
        reference = moving_reference(self.loss, self.models)
        saving = Save(Path(path), self.policy, self.optimizer, state, self.parallel, reference=reference)
        saving.write()
        saving.commit()

    def load(self, path: str | Path) -> None:
        """Restore what `save` wrote.

        Raises:
            RunDirError: The folder is damaged, or was saved with another model.
        """
        path = Path(path)
        verify(path, self.parallel)
        reference = moving_reference(self.loss, self.models)
        state = load_checkpoint(path, self.policy, self.optimizer, self.parallel, reference)
        if state.get("model") != model_fingerprint(self.config.model):
            raise RunDirError(f"{path}: was saved with another model. Use the options of that session.", "mismatch")
        self.precision.load_state_dict(state["precision"])
        self.step, self.updates, self.generator.calls = (state[name] for name in ("step", "updates", "n_sampled"))
        restore_rng(path, self.parallel)

    def save_model(self, path: str | Path) -> None:
        """Save the current model or adapter with its tokenizer, in the format of `from_pretrained`."""
        check_target(Path(path))
        base = self.config.model.name_or_path
        card = f"`{base}` trained with the loss `{self.loss.name}` by minitrain {__version__}, {self.step} steps.\n"
        rest = self.tokenizer, self.precision.dtype, self.parallel, lambda: card
        write_model(Path(path), self.policy, self.loss, *rest)

    def _usable(self, loss: Loss | str | None) -> Loss:
        """Return the loss of a call. Raises ConfigError if it needs what the session does not have."""
        if loss is None:
            return self.loss
        loss, own = loss_object(loss), self.loss
        loss.set_online(self.config)
        if missing := loss.requires - own.requires:
            raise ConfigError(
                f"loss: {loss.name} needs a {' and a '.join(sorted(missing))}, which the loss of the session does not. "
                f"Create the session with loss={loss.name!r}.",
                "conflict",
            )
        if "classification" in {loss.example_type, own.example_type} and loss.example_type != own.example_type:
            raise ConfigError(
                f"loss: {loss.name} needs another head than {own.name}. Create a session for each.", "conflict"
            )
        return loss

    def _loader(self, examples: Iterable[Mapping[str, Any]], loss: Loss) -> MicrobatchLoader:
        """Return a loader of data rows, which are tokenized now."""
        rows = rows_object(examples, "examples")
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            datasets = [DatasetConfig(rows.identifier)]
            config = dataclasses.replace(self.config, datasets=datasets, cache_dir=folder, quiet=True)
            data = load_data(config, self.template, loss.data_kind)
        add_features(loss, data.train.caches)
        if self.parallel.rank == 0 and not self.config.quiet:
            for line in data.summary:
                print(line, file=sys.stderr)
        rest = self.tokenizer, self.policy, self.parallel.rank, self.parallel.world_size
        return make_loader(data.train, config, *rest)
