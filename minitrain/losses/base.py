"""The contract of a loss, and the registry that finds it by name.

A loss returns a sum and the number of items (tokens, pairs ...) that it is over; the trainer divides by the number of
items of the full optimizer step, over all micro-batches and ranks. So the gradient does not depend on how a batch is
split.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from minitrain.batch import Batch, PolicyOutput
from minitrain.config.aliases import replace_aliases
from minitrain.config.issues import ConfigIssues, Source, check_types
from minitrain.config.schema import aliases
from minitrain.errors import ConfigError

EXAMPLE_TYPES = ("conversation", "preference", "unpaired_preference", "classification", "rollout")
OLD_NAMES = {  # of the contract of 0.1.0
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
    """The models that a loss is called with; each is called as `models.policy(batch)` and returns `PolicyOutput`."""

    policy: Callable[..., PolicyOutput]
    reference: Callable[..., PolicyOutput] | None = None  # if the loss requires "reference"
    teacher: Any = (
        None  # if it requires "teacher"; `models.teacher.target_hidden_states(batch)` are its final hidden states
    )

    def frozen(self) -> dict[str, Any]:
        """Return the models besides the policy, by name."""
        return {name: model for name, model in self._asdict().items() if name != "policy" and model is not None}


@dataclass
class LossOutput:
    """What a loss gives for one micro-batch.

    `metrics` maps a name to (sum, weight); they are reduced over micro-batches and ranks like the loss.
    """

    loss_sum: Tensor  # [] attached to the graph, also when everything is masked
    num_items: Tensor  # []
    metrics: dict[str, tuple[Tensor, Tensor]]
    samples: dict[str, Tensor] = field(default_factory=dict)  # name -> [n], kept for `compute_eval_metrics`


class DataFile(Protocol):
    """What a loss may know of a data file's D documents of T tokens altogether."""

    source: str  # its path
    key: str  # a hash of all that determines its tokens
    doc_features: dict[str, np.ndarray]  # name -> [D]
    token_features: dict[str, Tensor]  # name -> [T, ...]
    offsets: np.ndarray  # [D + 1] where each document begins
    mask: Tensor  # [T] uint8, which tokens are learned
    labels: list[str]  # what values["label"] counts


class AddedFeatures(NamedTuple):
    """What a loss adds to the D documents and T tokens of a data file; what has the same name is replaced."""

    file: DataFile
    doc_features: Mapping[str, np.ndarray] = {}  # name -> [D]
    token_features: Mapping[str, Tensor] = {}  # name -> [T, ...]
    labels: list[str] | None = None  # what doc_features["label"] counts, if that is added


class Loss:
    """A pluggable objective. Subclass it, give it a dataclass of options, and `register_loss` it.

    Write `num_items` and `__call__`; the rest is for losses that need it.
    """

    has_step_statistics: ClassVar[bool] = False  # whether it needs sums over the whole step before it is called

    example_type: ClassVar[str] = "conversation"  # what it is trained on, one of EXAMPLE_TYPES
    dropout: ClassVar[bool] = True  # whether the policy's dropout is on while it trains
    temperature: float = 1.0  # at which it asks for log-probabilities
    options_class: ClassVar[type]
    name: ClassVar[str]

    def __init__(self, options: Any):
        self.options = options

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise ConfigError for a class that has the contract of an older version."""
        super().__init_subclass__(**kwargs)
        _check_contract(cls)

    def unused_options(self) -> dict[str, str]:
        """Return the options that have no effect with the others, each with what it needs."""
        return {}

    def conflicts(self) -> dict[str, str]:
        """Return the options whose values cannot work together, each with the reason and what to do instead."""
        return {}

    @property
    def requires(self) -> frozenset[str]:
        """Any of: reference, teacher (models that it is called with), values (a value head on the policy)."""
        return frozenset()

    @property
    def head_labels(self) -> list[str] | None:
        """Names of the outputs of the model's scalar head; None for a language model."""
        return None

    def on_data_loaded(self, train: Sequence[DataFile], eval: Sequence[DataFile]) -> Iterable[AddedFeatures]:
        """Return features to add to the data files. Called once, before a model is built.

        A file that is split into training and evaluation data is in both lists.

        Raises:
            ConfigError, DataError: For data that the options do not fit.
        """
        return ()

    def num_items(self, batch: Batch) -> Tensor:
        """Return the number of items in this micro-batch, shape []. Calls no model."""
        raise NotImplementedError

    def step_statistics(self, batch: Batch, models: Models) -> Tensor:
        """Return sums over a micro-batch, shape [S]. Called without gradients, if `has_step_statistics`."""
        raise NotImplementedError

    def set_step_statistics(self, statistics: Tensor) -> None:
        """Take those sums over all micro-batches and ranks, shape [S], before the loss is called for any of them."""
        raise NotImplementedError

    def __call__(self, batch: Batch, models: Models) -> LossOutput:
        """Return the loss of a micro-batch, summed.

        `models.policy(batch)` returns `PolicyOutput`: per-token log-probabilities, never logits. Call each model
        equally often on every rank, so never under a condition on what is in the batch.
        """
        raise NotImplementedError

    def finalize_metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Return what is logged, from the means of the metrics; for metrics that are not means, like perplexity."""
        return means

    def compute_eval_metrics(self, samples: dict[str, list[float]]) -> dict[str, float]:
        """Return metrics of an evaluation from all samples, in any order; for those that are no sums, like a rank."""
        return {}


def _check_contract(cls: type[Loss]) -> None:
    own = vars(cls)
    changes = [f"rename {old} to {new}" for old, new in OLD_NAMES.items() if old in own and new.split()[0] not in own]
    if "__call__" in own and not _takes_models(inspect.signature(cls.__call__)):
        changes.append("write __call__(self, batch, models), with models.policy, models.reference and models.teacher")
    if cls.example_type not in EXAMPLE_TYPES:
        changes.append(f"set example_type, which is {cls.example_type!r}, to one of {', '.join(EXAMPLE_TYPES)}")
    if "step_statistics" in own and not cls.has_step_statistics:
        changes.append("set has_step_statistics = True")
    if changes:
        raise ConfigError(f"{cls.__name__}: does not have the methods of a loss: {'; '.join(changes)}.", "usage")


def _takes_models(signature: inspect.Signature) -> bool:
    try:
        signature.bind("self", "batch", "models")
    except TypeError:
        return False
    return not {"policy", "reference", "teacher"} & set(signature.parameters)


def add_features(loss: Loss, train: Sequence[DataFile], eval: Sequence[DataFile] = ()) -> None:
    """Show a loss the data files, and add to them what it returns. Raises ConfigError or DataError."""
    for added in loss.on_data_loaded(train, eval) or ():
        added.file.doc_features |= added.doc_features
        added.file.token_features |= added.token_features
        if added.labels is not None:
            added.file.labels = added.labels


class PairLoss(Loss):
    """A loss whose unit is the pair: documents 2i and 2i + 1, both of which have targets."""

    def num_items(self, batch: Batch) -> Tensor:
        return valid_pairs(batch).sum().float()


def valid_pairs(batch: Batch) -> Tensor:
    """Return which pairs have targets in both documents -> [P] bool."""
    return batch.docs_with_targets.view(-1, 2).all(1)


_REGISTRY: dict[str, type[Loss]] = {}


def register_loss(name: str, options_class: type):
    """Class decorator: makes a `Loss` available as `loss.name` with `options_class` as its typed options."""

    def register(cls: type[Loss]) -> type[Loss]:
        if name in _REGISTRY:
            raise ConfigError(f"a loss named {name!r} is registered already", "already-exists")
        cls.name, cls.options_class = name, options_class
        _REGISTRY[name] = cls
        return cls

    return register


def registered() -> dict[str, type[Loss]]:
    """The losses by name."""
    return dict(_REGISTRY)


def loss_options(name: str) -> type | None:
    """Return the dataclass of the options of a loss, or None for a name that is not registered."""
    return _REGISTRY[name].options_class if name in _REGISTRY else None


def create_loss(name: str, **options) -> Loss:
    """Create a loss by name: ``create_loss("sft", label_smoothing=0.1)``.

    Raises ConfigError for an unknown name and for every option that the check of a config refuses: unknown ones, values
    that are not allowed or do not go together, and options that would have no effect.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"there is no loss {name!r}; there are {', '.join(_REGISTRY)}", "not-a-choice")
    schema = _REGISTRY[name].options_class
    known = [f.name for f in fields(schema)]
    unknown = [key for key in options if key not in (*known, *aliases(schema))]
    if unknown:
        raise ConfigError(
            f"loss {name} has no option {', '.join(unknown)}; it has {', '.join(known)}", "unknown-option"
        )
    issues = ConfigIssues(Source(f"loss {name}"))
    options = replace_aliases(options, aliases(schema))
    loss = build_loss(name, check_types(schema, options, "loss.", issues), options, issues)
    issues.raise_if_any()
    return loss


def build_loss(name: str, options: dict[str, Any], given: Collection[str], issues: ConfigIssues) -> Loss | None:
    """Build a loss from checked options, and add to `issues` what these have against one another.

    Args:
        options: Those of the right type, by name.
        given: Names of all options that were given.

    Returns None where a required option is missing.
    """
    cls = _REGISTRY[name]
    required = [f.name for f in fields(cls.options_class) if f.default is MISSING and f.default_factory is MISSING]
    if any(key not in options for key in required):
        return None
    loss = cls(cls.options_class(**options))
    for key, reason in loss.unused_options().items():
        if key in given:
            issues.add(f"loss.{key}", "no-effect", f"would be ignored: {reason}")
    for key, reason in loss.conflicts().items():
        issues.add(f"loss.{key}", "conflict", reason)
    return loss


def describe_loss(loss: Loss) -> dict[str, Any]:
    """Return what a config has to say under `loss` for the same loss: its name, and options that are not the default.

    A class that is not registered is described by its full name, which no config can load, so that its run is never
    resumed with another loss.
    """
    options = loss.options
    described = {f.name: getattr(options, f.name) for f in fields(options)} if is_dataclass(options) else {}
    for f in fields(options) if is_dataclass(options) else ():
        rest = {key: value for key, value in described.items() if key != f.name}
        if _builds(type(options), rest, options):  # the default, or what __post_init__ makes of the others
            described = rest
    kind = type(loss)
    if _REGISTRY.get(getattr(loss, "name", None)) is kind:
        return {"name": kind.name} | described
    named = {"name": f"{kind.__module__}.{kind.__qualname__}"}
    return named | {key: _as_yaml(value) for key, value in described.items()}


def _builds(options_class: type, given: dict[str, Any], options: Any) -> bool:
    try:
        return options_class(**given) == options
    except TypeError:  # one that has no default
        return False


def _as_yaml(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else repr(value)
