"""Whether all ranks got the same options, data and model; otherwise they would wait for one another without end."""

from minitrain.config.saved import plain
from minitrain.config.schema import Config
from minitrain.data.loader import Data
from minitrain.distributed.parallel import SingleDevice

# May differ between ranks: paths on a disk of each machine, where `check_same_inputs` compares the content, and output.
PER_MACHINE = ("output_dir", "cache_dir", "model", "datasets", "eval_datasets", "quiet", "wandb", "swanlab")


def check_same_options(config: Config, parallel: SingleDevice) -> None:
    """Raise ConfigError on all ranks when an option differs between them, as `${oc.env:...}` can."""
    parallel.check_same(**{name: value for name, value in plain(config).items() if name not in PER_MACHINE})


def check_same_inputs(config: Config, data: Data, fingerprint: list[str], parallel: SingleDevice) -> None:
    """Raise ConfigError on all ranks when their data, or the fingerprints of their base models, differ."""
    keys = {"datasets": [cache.key for cache in data.train.caches]}
    if config.eval_datasets and data.eval:
        keys["eval_datasets"] = [cache.key for cache in data.eval.caches]
    parallel.check_same(**keys, model=fingerprint)
