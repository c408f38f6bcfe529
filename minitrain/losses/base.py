"""The contract of a loss, and the registry that finds it by name.

A loss returns a sum and the weight of that sum in its own units; the trainer divides by the weight of the
whole optimizer step, over all micro-batches and ranks. So the gradient does not depend on how a batch is cut.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from ..batch import Batch
from ..errors import ConfigError


@dataclass
class LossOutput:
    """What a loss gives for one micro-batch.

    `metrics` maps a name to (sum, weight); they are reduced over micro-batches and ranks like the loss.
    """

    sum: Tensor  # [] attached to the graph, also when everything is masked
    weight: Tensor  # []
    metrics: dict[str, tuple[Tensor, Tensor]]


class Loss:
    """A pluggable objective. Subclass it, give it a dataclass of options, and `register_loss` it."""

    needs: ClassVar[frozenset[str]] = frozenset()  # of: reference, teacher, values, entropy, scores
    record: ClassVar[str] = "conversation"  # the kind of data it learns from
    options_class: ClassVar[type]
    name: ClassVar[str]

    def __init__(self, options: Any):
        self.options = options

    def weight(self, batch: Batch) -> Tensor:
        """Units in this micro-batch -> []; needs no model."""
        raise NotImplementedError

    def __call__(self, batch: Batch, policy, reference=None, teacher=None) -> LossOutput:
        """`policy(batch)` gives `Scores`: per-token log-probabilities, never logits."""
        raise NotImplementedError

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, from the means of the metrics; for figures that are no means, like perplexity."""
        return means


_REGISTRY: dict[str, type[Loss]] = {}


def register_loss(name: str, options_class: type):
    """Class decorator: makes a `Loss` available as `loss.name` with `options_class` as its typed options."""

    def register(cls: type[Loss]) -> type[Loss]:
        if name in _REGISTRY:
            raise ConfigError(f"a loss named {name!r} is registered already")
        cls.name, cls.options_class = name, options_class
        _REGISTRY[name] = cls
        return cls

    return register


def registered() -> dict[str, type[Loss]]:
    """The losses by name."""
    return dict(_REGISTRY)


def create_loss(name: str, **options) -> Loss:
    """Makes a loss by name: ``create_loss("sft", label_smoothing=0.1)``.

    Raises ConfigError for an unknown name, option or value.
    """
    if name not in _REGISTRY:
        raise ConfigError(f"there is no loss {name!r}; there are {', '.join(_REGISTRY)}")
    cls = _REGISTRY[name]
    known = [f.name for f in fields(cls.options_class)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ConfigError(f"loss {name} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return cls(cls.options_class(**options))
