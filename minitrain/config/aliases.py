"""Aliases of options, options that exclude each other, and dataset types of other tools."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .schema import DEFAULT_LOSS, aliases

LossOptions = Callable[[str], type | None]  # returns the dataclass of the options of a loss, by its name

# The first option of a pair would hide the second, so setting both is an error. An override of one replaces the other
# one in the file.
MUTUALLY_EXCLUSIVE = (
    ("n_steps", "n_epochs"),
    ("warmup_steps", "warmup_ratio"),
    ("eval_datasets", "validation_split"),
    ("packing", "group_by_length"),
    ("max_tokens_per_micro_batch", "gradient_accumulation_steps"),
)

# Values of `datasets.type` in the chat SFT/DPO trainer: the origin of a data set, which minitrain reads from its path.
ORIGIN_TYPES = ("custom_dataset", "huggingface_dataset")


def all_aliases(given: Mapping[str, Any], loss_options: LossOptions, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return {alias: name} for the options of a config and of its loss."""
    loss_aliases = _loss_aliases(given, loss_options, overrides)
    return aliases() | {f"loss.{alias}": f"loss.{name}" for alias, name in loss_aliases.items()}


def resolve_aliases(given: Mapping[str, Any], loss_options: LossOptions) -> dict[str, Any]:
    """Return a config with the names of options instead of aliases, except where an option is set under two names."""
    renamed = replace_aliases(given, aliases())
    if isinstance(loss := renamed.get("loss"), dict):
        renamed["loss"] = replace_aliases(loss, _loss_aliases(given, loss_options))
    return renamed


def replace_aliases(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return options with `names` instead of aliases, except where an option is set under two names."""
    renamed: dict[str, Any] = {}
    for key, value in given.items():
        name = names.get(key, key)
        is_set_twice = name in renamed or (name != key and name in given)
        renamed[key if is_set_twice else name] = value
    return renamed


def _loss_aliases(given: Mapping[str, Any], loss_options: LossOptions, overrides: Sequence[str] = ()) -> dict[str, str]:
    loss = given.get("loss")
    has_options = isinstance(loss, dict) and bool(loss.keys() - {"name"})
    if not has_options and not any(re.match(r"loss(\.(?!name=)|=\{)", override) for override in overrides):
        return {}  # `loss_options` imports torch, which takes seconds
    options = loss_options(_loss_name(given, overrides))
    return aliases(options) if options else {}


def _loss_name(given: Mapping[str, Any], overrides: Sequence[str]) -> str:
    for override in reversed(overrides):
        key, _, value = override.partition("=")
        match = re.search(r"\bname: *['\"]?(\w+)", value) if key == "loss" else None
        if key == "loss.name" or (key == "loss" and (match or value.isidentifier())):
            return match[1] if match else value
    loss = given.get("loss", DEFAULT_LOSS)
    return str(loss.get("name", DEFAULT_LOSS["name"]) if isinstance(loss, dict) else loss)
