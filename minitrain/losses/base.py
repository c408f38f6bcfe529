"""The interface of a loss, and the registry of losses by name.

A loss returns a sum over items (tokens, pairs, ...) and their number; the trainer divides by the number of items of the
full optimizer step, over all micro-batches and ranks. So the gradient does not depend on how a batch is
split.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from minitrain.batch import TARGET_WEIGHTS, Batch, PolicyOutput, to_device
from minitrain.config.aliases import replace_aliases
from minitrain.config.issues import ConfigIssues, ConfigSource, check_types
from minitrain.config.schema import Config, aliases
from minitrain.errors import ConfigError, DataError

L = TypeVar("L", bound="Loss")
EXAMPLE_TYPES = (
    "conversation",
    "preference",
    "unpaired_preference",
    "classification",
    "solution",
    "retrieval",
    "ranking",
    "rollout",
)
OLD_NAMES = {  # names of 0.1.0
    "weight": "num_items",
    "record": "example_type",
    "outputs": "head_labels",
    "ignored": "unused_options",
    "summary": "finalize_metrics",
    "judge": "compute_eval_metrics",
    "needs": "requires",
    "prepare": "on_data_loaded (return AddedFeatures instead of changing the files)",
    "statistics": "step_statistics",
    "receive": "set_step_statistics",
}


class Models(NamedTuple):
    """The models that a loss calls, as in `models.policy(batch)`, which returns `PolicyOutput`.

    Attributes:
        reference: Set if the loss requires "reference".
        teacher: Set if it requires "teacher". `models.teacher.target_hidden_states(batch)` returns its hidden states.
        start: The policy before training, for `eval_kl_to_start`. It can be the reference.
    """

    policy: Callable[..., PolicyOutput]
    reference: Callable[..., PolicyOutput] | None = None
    teacher: Any = None
    start: Any = None

    def frozen(self) -> dict[str, Any]:
        """Return the models other than the policy, each once, by name."""
        models = {name: model for name, model in self._asdict().items() if name != "policy" and model is not None}
        if self.start is self.reference:
            models.pop("start", None)
        return models


@dataclass
class LossOutput:
    """The loss of one micro-batch.

    `metrics` maps a name to (sum, weight). Both are summed over micro-batches and ranks, like the loss.
    """

    loss_sum: Tensor  # [] part of the autograd graph even if every token is masked
    num_items: Tensor  # []
    metrics: dict[str, tuple[Tensor, Tensor]]
    samples: dict[str, Tensor] = field(default_factory=dict)  # name -> [n], kept for `compute_eval_metrics`


class DataFile(Protocol):
    """What a loss sees of a data file with D documents and T tokens in total."""

    source: str  # its path
    key: str  # a hash of everything that determines its tokens
    doc_features: dict[str, np.ndarray]  # name -> [D]
    token_features: dict[str, Tensor]  # name -> [T, ...]
    offsets: np.ndarray  # [D + 1] where each document begins
    mask: Tensor  # [T] uint8, 1 for targets
    labels: list[str]  # what doc_features["label"] indexes


class AddedFeatures(NamedTuple):
    """Features that a loss adds to a data file with D documents and T tokens, or replaces."""

    file: DataFile
    doc_features: Mapping[str, np.ndarray] = {}  # name -> [D]
    token_features: Mapping[str, Tensor] = {}  # name -> [T, ...]
    labels: list[str] | None = None  # what doc_features["label"] indexes, if that is added


class Loss:
    """Base class of losses. Write a subclass and a dataclass of its options, and decorate it with `register_loss`.

    `num_items` and `__call__` are required; the rest is optional.
    """

    uses_target_weights: ClassVar[bool] = False  # whether it multiplies its losses by `batch.target_weights`
    has_step_statistics: bool = False  # whether it needs sums over the full optimizer step before it is called
    gathers_rows: bool = False  # whether it needs a row of each item of the full optimizer step before it is called
    example_type: ClassVar[str] = "conversation"  # one of EXAMPLE_TYPES
    online: bool = False  # whether its examples are sampled during training
    dropout: ClassVar[bool] = True  # whether the policy's dropout is active in training
    uses_partners: bool = True  # whether an unpaired preference comes with a response to another prompt
    multi_label: bool = False  # whether each output of the sequence head is a yes or no by itself
    full_lr: ClassVar[float] = 2e-5  # the default of `lr` without an adapter
    temperature: float = 1.0  # of the log-probabilities
    options_class: ClassVar[type]
    name: ClassVar[str]

    def __init__(self, options: Any):
        self.options = options

    def set_online(self, config: Config) -> None:
        """Set whether the examples of a run are sampled during training."""
        self.online = config.rollout.num_generations > 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise ConfigError for a class with the interface of an older version."""
        super().__init_subclass__(**kwargs)
        _check_contract(cls)

    @property
    def data_kind(self) -> str:
        """The kind of examples in the data files."""
        return "prompt" if self.online else self.example_type

    def unused_options(self) -> dict[str, str]:
        """Return the options that have no effect, each with the reason."""
        return {}

    def conflicts(self) -> dict[str, str]:
        """Return the options with invalid or conflicting values, each with the reason and what to do."""
        return {}

    @property
    def requires(self) -> frozenset[str]:
        """Any of: "reference" and "teacher" (models that it calls), "values" (a value head on the policy)."""
        return frozenset()

    @property
    def head_labels(self) -> list[str] | None:
        """Names of the outputs of the sequence head; None for a language model."""
        return None

    @property
    def writes_text(self) -> bool:
        """Whether its model writes text. Others return scores or embeddings."""
        return self.head_labels is None and self.example_type != "retrieval"

    def model_files(self, hidden_size: int) -> dict[str, Any]:
        """Return what the folder of a saved model has besides the model: path -> content of a JSON file."""
        return {}

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> Iterable[AddedFeatures]:
        """Return features to add to the data files. Called once, before the model is built.

        A file that is split into training and evaluation data is in both lists.

        Raises:
            ConfigError, DataError: If the data and the options do not match.
        """
        return ()

    def num_items(self, batch: Batch) -> Tensor:
        """Return the number of items in this micro-batch, shape [], without calling a model."""
        raise NotImplementedError

    def step_statistics(self, batch: Batch, models: Models) -> Tensor:
        """Return sums over a micro-batch, shape [S]. Called without gradients, if `has_step_statistics`."""
        raise NotImplementedError

    def set_step_statistics(self, statistics: Tensor) -> None:
        """Receive those sums over all micro-batches and ranks, shape [S], before the first call of the step."""
        raise NotImplementedError

    def step_rows(self, batch: Batch, models: Models) -> tuple[Tensor, Tensor]:
        """Return a row of each item of a micro-batch, [m, K], and numbers from the batch alone, [m, F].

        Called without gradients, if `gathers_rows`.
        """
        raise NotImplementedError

    def set_step_rows(self, rows: Tensor | None, numbers: Tensor | None, own: slice) -> None:
        """Receive both of all micro-batches and ranks before the first call of the step.

        Args:
            rows: By rank, then in the order of the calls, shape [n, K]. None if the step is one micro-batch, whose
                rows the loss can compute with gradients.
            numbers: Shape [n, F].
            own: The rows of this rank.
        """
        raise NotImplementedError

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        """Return the summed loss of a micro-batch.

        `models.policy(batch)` returns `PolicyOutput`: per-token log-probabilities, never logits. Call each model
        the same number of times on every rank, so never depending on the content of the batch.
        """
        raise NotImplementedError

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Return the metrics to log, given the means of all metrics. Override it for metrics like perplexity."""
        return means

    def compute_eval_metrics(self, samples: dict[str, list[float]]) -> dict[str, float]:
        """Return metrics computed from all samples of an evaluation, in any order, such as a rank correlation."""
        return {}


def _check_contract(cls: type[Loss]) -> None:
    defined = vars(cls)
    changes = [
        f"rename {old} to {new}" for old, new in OLD_NAMES.items() if old in defined and new.split()[0] not in defined
    ]
    if "__call__" in defined and not _takes_models(inspect.signature(cls.__call__)):
        changes.append("define __call__(self, batch, models), with models.policy, models.reference and models.teacher")
    if cls.example_type not in EXAMPLE_TYPES:
        changes.append(f"set example_type to one of {', '.join(EXAMPLE_TYPES)}, not {cls.example_type!r}")
    if "step_statistics" in defined and not cls.has_step_statistics:
        changes.append("set has_step_statistics = True")
    if changes:
        raise ConfigError(
            f"{cls.__name__}: does not have the interface of a loss. Change it: {'; '.join(changes)}.", "usage"
        )


def _takes_models(signature: inspect.Signature) -> bool:
    try:
        signature.bind("self", "batch", "models")
    except TypeError:
        return False
    return not {"policy", "reference", "teacher"} & set(signature.parameters)


def add_features(loss: Loss, train: Sequence[DataFile], eval: Sequence[DataFile] = ()) -> None:
    """Add to the data files the features that the loss computes from them. Raise ConfigError or DataError."""
    for file in (*train, *eval):
        if TARGET_WEIGHTS in file.token_features and not loss.uses_target_weights:
            raise DataError(
                f"{file.source}: turns have weights other than 0 and 1, which this loss does not use. Remove them, or "
                "use sft, dft or kd.",
                "no-effect",
            )
    for added in loss.on_data_loaded(train, eval) or ():
        added.file.doc_features |= added.doc_features
        added.file.token_features |= added.token_features
        if added.labels is not None:
            added.file.labels = added.labels


class PairLoss(Loss):
    """A loss whose unit is the pair: documents 2i and 2i + 1, both of which have targets."""

    def num_items(self, batch: Batch) -> Tensor:
        return scalar(_valid_pairs(batch).sum(), batch)


def pairs_of(values: Tensor, batch: Batch) -> Tensor:
    """Return values of the documents [D] by pair, of the P pairs that have targets in both documents, shape [P, 2]."""
    pairs, valid = values.view(-1, 2), _valid_pairs(batch)
    return pairs if valid.all() else pairs.index_select(0, to_device(valid.nonzero()[:, 0], values.device))


def _valid_pairs(batch: Batch) -> Tensor:
    """Return which pairs have targets in both documents, bool on the CPU, shape [pairs]."""
    return batch.docs_with_targets.view(-1, 2).all(1)


def scalar(number: float | Tensor, batch: Batch) -> Tensor:
    """Return a number as a float32 tensor on the batch's device, shape [], without waiting for the device."""
    return torch.full((), float(number), device=batch.targets.device)


_REGISTRY: dict[str, type[Loss]] = {}


def register_loss(name: str, options_class: type) -> Callable[[type[L]], type[L]]:
    """Register the decorated `Loss` as `loss.name`, with the dataclass `options_class` as its options.

    The same class can be defined again, as a cell of a notebook does.
    """

    def register(cls: type[L]) -> type[L]:
        if name in _REGISTRY and repr(_REGISTRY[name]) != repr(cls):
            raise ConfigError(f"a loss named {name!r} is already registered. Use another name.", "already-exists")
        if not is_dataclass(options_class):
            message = f"register_loss({name!r}): expected a dataclass of options, got {options_class!r}."
            raise ConfigError(f"{message} Decorate it with @dataclass.", "wrong-type")
        if not (isinstance(cls, type) and issubclass(cls, Loss)):
            message = f"register_loss({name!r}): expected a subclass of Loss, got {cls!r}."
            raise ConfigError(f"{message} Write class {getattr(cls, '__name__', 'Mine')}(Loss).", "wrong-type")
        cls.name, cls.options_class = name, options_class
        _REGISTRY[name] = cls
        return cls

    return register


def registered() -> dict[str, type[Loss]]:
    """Return the losses by name."""
    return dict(_REGISTRY)


def loss_options(name: str) -> type | None:
    """Return the dataclass of the options of a loss, or None for a name that is not registered."""
    return _REGISTRY[name].options_class if name in _REGISTRY else None


def create_loss(name: str, **options: Any) -> Loss:
    """Create a loss by name: ``create_loss("sft", label_smoothing=0.1)``.

    Raises:
        ConfigError: For an unknown name, and for options that are unknown, invalid, in conflict, or without effect.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"unknown loss {name!r}. Use one of {', '.join(_REGISTRY)}.", "not-a-choice")
    schema = _REGISTRY[name].options_class
    known = [f.name for f in fields(schema)]
    unknown = [key for key in options if key not in (*known, *aliases(schema))]
    if unknown:
        raise ConfigError(
            f"loss {name}: unknown option {', '.join(unknown)}. Its options are {', '.join(known)}.", "unknown-option"
        )
    issues = ConfigIssues(ConfigSource(f"loss {name}"))
    options = replace_aliases(options, aliases(schema))
    loss = build_loss(name, check_types(schema, options, "loss.", issues), options, issues)
    issues.raise_if_any()
    return loss


def build_loss(name: str, options: dict[str, Any], given: Collection[str], issues: ConfigIssues) -> Loss | None:
    """Build a loss from options of the right types, and add their conflicts to `issues`.

    Args:
        options: The options that have the right type, by name.
        given: The names of all options that were set.

    Returns:
        The loss, or None if a required option is missing.
    """
    cls = _REGISTRY[name]
    required = [f.name for f in fields(cls.options_class) if f.default is MISSING and f.default_factory is MISSING]
    if any(key not in options for key in required):
        return None
    loss = cls(cls.options_class(**options))
    for key, reason in loss.unused_options().items():
        if key in given:
            issues.add(f"loss.{key}", "no-effect", f"has no effect: {reason}")
    for key, reason in loss.conflicts().items():
        issues.add(f"loss.{key}", "conflict", reason)
    return loss


def describe_loss(loss: Loss) -> dict[str, Any]:
    """Return the `loss` section of a config for this loss: its name, and the options that are not at their default.

    A class that is not registered is described by its full name, which a config cannot load, so its run is never
    resumed with another loss.
    """
    options = loss.options
    described = {f.name: getattr(options, f.name) for f in fields(options)} if is_dataclass(options) else {}
    for f in fields(options) if is_dataclass(options) else ():
        rest = {key: value for key, value in described.items() if key != f.name}
        if _builds(type(options), rest, options):  # the default, or what __post_init__ derives from the others
            described = rest
    cls = type(loss)
    if _REGISTRY.get(getattr(loss, "name", None)) is cls:
        return {"name": cls.name} | described
    yaml_values = {key: _as_yaml(value) for key, value in described.items()}
    return {"name": f"{cls.__module__}.{cls.__qualname__}"} | yaml_values


def _builds(options_class: type, given: dict[str, Any], options: Any) -> bool:
    try:
        return options_class(**given) == options
    except TypeError:  # an option without a default is missing
        return False


def _as_yaml(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else repr(value)
