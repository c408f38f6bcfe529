"""Checks that all ranks have the same options, data and model. Otherwise they would wait for each other forever."""

from minitrain.config.saved import to_plain
from minitrain.config.schema import Config
from minitrain.data.loader import Data
from minitrain.distributed.parallel import SingleDevice

# May differ between ranks: output options, and local paths, whose content `check_same_inputs` compares.
PER_MACHINE = ("output_dir", "cache_dir", "model", "datasets", "eval_datasets", "quiet", "wandb", "swanlab")


def check_same_options(config: Config, parallel: SingleDevice) -> None:
    """Raise ConfigError on all ranks if an option differs between them, as `${oc.env:...}` can."""
    parallel.check_same(**{name: value for name, value in to_plain(config).items() if name not in PER_MACHINE})


def check_same_inputs(config: Config, data: Data, fingerprint: list[str], parallel: SingleDevice) -> None:
    """Raise ConfigError on all ranks when their data, or the fingerprints of their base models, differ."""
    keys = {"datasets": [cache.key for cache in data.train.caches]}
    if config.eval_datasets and data.eval:
        keys["eval_datasets"] = [cache.key for cache in data.eval.caches]
    parallel.check_same(**keys, model=fingerprint)
