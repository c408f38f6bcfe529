"""minitrain: a pure-PyTorch minimal trainer for post-training language models.

>>> from minitrain import Trainer, load_config
>>> Trainer(load_config("config.yml", lr=1e-4)).train()
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batch import Batch as Batch
    from .batch import PolicyOutput as PolicyOutput
    from .config.schema import Config as Config
    from .distributed.process import exit_process as exit_process
    from .errors import ConfigError as ConfigError
    from .errors import DataError as DataError
    from .errors import MinitrainError as MinitrainError
    from .errors import RunDirError as RunDirError
    from .errors import RunError as RunError
    from .inference.generate import Generator as Generator
    from .inference.generate import Sampling as Sampling
    from .inference.generate import load_generator as load_generator
    from .inference.merge import merge_adapters as merge_adapters
    from .losses import Loss as Loss
    from .losses import LossOutput as LossOutput
    from .losses import Models as Models
    from .losses import create_loss as create_loss
    from .losses import register_loss as register_loss
    from .session import SampledResponse as SampledResponse
    from .session import Session as Session
    from .tools.preflight.load import load_config as load_config
    from .trainer import Trainer as Trainer
    from .training.step import StepOutput as StepOutput

__version__ = "0.1.0"

_HOMES = {
    "Trainer": "trainer",
    "Session": "session",
    "SampledResponse": "session",
    "load_config": "tools.preflight.load",
    "Config": "config.schema",
    "create_loss": "losses",
    "register_loss": "losses",
    "Loss": "losses",
    "LossOutput": "losses",
    "Models": "losses",
    "Batch": "batch",
    "PolicyOutput": "batch",
    "StepOutput": "training.step",
    "Generator": "inference.generate",
    "Sampling": "inference.generate",
    "load_generator": "inference.generate",
    "merge_adapters": "inference.merge",
    "exit_process": "distributed.process",
    "MinitrainError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "RunError": "errors",
    "RunDirError": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `--help` need not wait for torch."""
    if name not in _HOMES:
        message = f"module 'minitrain' has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=sys.modules[__name__])  # Python suggests a name by these
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Return the public names, without those that this file needs itself."""
    return sorted([*__all__, "__version__"])
