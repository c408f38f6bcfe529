"""Other names of options, options that exclude one another, and values that are accepted but have no effect."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .schema import DEFAULT_LOSS, aliases

LossOptions = Callable[[str], type | None]  # from the name of a loss to the dataclass of its options

# Beside the first of a pair the second would be ignored, so both together are refused. One that is given in
# the overrides takes the place of the other one in the file.
MUTUALLY_EXCLUSIVE = (
    ("n_steps", "n_epochs"),
    ("warmup_steps", "warmup_ratio"),
    ("eval_datasets", "validation_split"),
    ("packing", "group_by_length"),
)

# Types of `datasets` of the chat SFT/DPO trainer: where a data set comes from, which its path says here.
UNTYPED = ("custom_dataset", "huggingface_dataset")


def all_aliases(given: Mapping[str, Any], loss_options: LossOptions, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Return the other names of the options of a config, and of the loss that it names -> their names."""
    of_loss = _loss_aliases(given, loss_options, overrides)
    return aliases() | {f"loss.{alias}": f"loss.{name}" for alias, name in of_loss.items()}


def with_own_names(given: Mapping[str, Any], loss_options: LossOptions) -> dict[str, Any]:
    """Return a config with aliases replaced by the names of their options, except where an option is set twice."""
    renamed = replace_aliases(given, aliases())
    if isinstance(loss := renamed.get("loss"), dict):
        renamed["loss"] = replace_aliases(loss, _loss_aliases(given, loss_options))
    return renamed


def replace_aliases(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Replace aliases by what `names` has for them, except where an option is set twice."""
    renamed: dict[str, Any] = {}
    for key, value in given.items():
        own = names.get(key, key)
        renamed[key if own in renamed or (own != key and own in given) else own] = value
    return renamed


def _loss_aliases(given: Mapping[str, Any], loss_options: LossOptions, overrides: Sequence[str] = ()) -> dict[str, str]:
    loss = given.get("loss")
    has_options = isinstance(loss, dict) and bool(loss.keys() - {"name"})
    if not has_options and not any(re.match(r"loss(\.(?!name=)|=\{)", text) for text in overrides):
        return {}  # `loss_options` imports torch, which takes seconds
    options = loss_options(_loss_name(given, overrides))
    return aliases(options) if options else {}


def _loss_name(given: Mapping[str, Any], overrides: Sequence[str]) -> str:
    for text in reversed(overrides):
        key, _, value = text.partition("=")
        found = re.search(r"\bname: *['\"]?(\w+)", value) if key == "loss" else None
        if key == "loss.name" or (key == "loss" and (found or value.isidentifier())):
            return found[1] if found else value
    loss = given.get("loss", DEFAULT_LOSS)
    return str(loss.get("name", DEFAULT_LOSS["name"]) if isinstance(loss, dict) else loss)
