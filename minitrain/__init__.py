"""minitrain: a pure-PyTorch minimal trainer for post-training language models."""

__version__ = "0.1.0"

_HOMES = {
    "Trainer": "trainer",
    "load_config": "tools.preflight.load",
    "Config": "config.schema",
    "create_loss": "losses",
    "register_loss": "losses",
    "Loss": "losses",
    "LossOutput": "losses",
    "Models": "losses",
    "Batch": "batch",
    "PolicyOutput": "batch",
    "exit_process": "distributed.process",
    "MinitrainError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "RunError": "errors",
    "RunFolderError": "errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Imports a public name when it is first used, so that `--help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minitrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
