"""Check a config beyond its types: options that conflict, have no effect, or name what does not exist."""

from collections.abc import Set

from minitrain.config.issues import ConfigIssues
from minitrain.config.load import default_config
from minitrain.config.schema import Config, option_fields
from minitrain.data import checks as data
from minitrain.distributed import checks as distributed
from minitrain.model import checks as model
from minitrain.training import checks as training

CHECKED_WITH_TORCH = {"loss", "optimizer", "optimizer_args", "betas", "eps", "weight_decay", "device", "fsdp"}


def check_config(
    config: Config, issues: ConfigIssues, written: Set[str] = frozenset(), loss_is_object: bool = False
) -> None:
    """Add to `issues` what is wrong with a config.

    Args:
        written: Names of options that count as given, also at their default.
        loss_is_object: The loss was given in Python, so its class need not be registered.
    """
    defaults = default_config()
    changed = {f.name for f in option_fields(Config) if getattr(config, f.name) != getattr(defaults, f.name)}
    given = changed | written
    for check in (distributed.check_processes, data.check, model.check, training.check):
        check(config, given, issues)
    if issues and not changed & CHECKED_WITH_TORCH:
        return  # torch takes seconds to import, and options at their default are rarely wrong
    from minitrain.losses import checks as losses

    distributed.check_device(config, issues)
    loss = losses.check(config, issues, loss_is_object)
    if loss is not None:
        training.check_loss_fits(config, given, loss, issues)
    training.check_optimizer_options(config, given, issues)
