"""The built-in losses. To add one, write a file in this package: all are imported."""

from importlib import import_module
from pkgutil import iter_modules

from .base import (
    AddedFeatures,
    Loss,
    LossOutput,
    Models,
    add_features,
    create_loss,
    describe_loss,
    loss_options,
    register_loss,
    registered,
)

__all__ = [
    "AddedFeatures",
    "Loss",
    "LossOutput",
    "Models",
    "add_features",
    "create_loss",
    "describe_loss",
    "loss_options",
    "register_loss",
    "registered",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
