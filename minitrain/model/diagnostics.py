"""What is wrong with the files of a model, in words."""

import contextlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minitrain.config.schema import ModelConfig
from minitrain.errors import ConfigError
from minitrain.io.hub import unreachable
from minitrain.io.redact import redact

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def model_load_error(config: ModelConfig, wanted: str, error: Exception) -> ConfigError:
    """What to tell when a model cannot be made. `wanted`: what it would have been."""
    folder = Path(config.name_or_path)
    reason = damage(folder) or missing_weights(folder) or first_line(error)
    told = ConfigError(f"no {wanted} in {config.name_or_path!r}: {reason}")
    return unreachable(config.name_or_path, error) or told


def named(outputs: list[str] | None) -> str:
    """A model that ends in these scalars, or in a vocabulary, in words."""
    return "causal language model" if outputs is None else f"model with {len(outputs)} outputs"


def tokenizer_load_error(name: str, error: Exception) -> ConfigError:
    """What to tell when a tokenizer cannot be read."""
    told = damage(Path(name)) or first_line(error)
    return unreachable(name, error) or ConfigError(f"no tokenizer could be loaded from {name!r}: {told}")


def refuse_encoder(shape: Any) -> None:
    """Raises ConfigError for the config of a model of BERT's kind, whose tokens see those that follow them.

    transformers takes one for a causal model and only warns.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if shape.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(shape, "is_decoder", False):
        raise ConfigError(f"{shape.model_type} is an encoder and continues no text; loss.name=classify can train it.")


def check_missing_keys(config: ModelConfig, found: dict, outputs: list[str] | None) -> None:
    """Raises ConfigError for weights that files do not hold: transformers draws them at random, and goes on.

    `found` is its loading info. With `outputs` the model may have a new head, so gaps are for others to judge.
    """
    for name, there, wanted in sorted(found["mismatched_keys"]):
        told = f"in its files {name} has the shape {list(there)}, and not {list(wanted)} as in its config"
        raise ConfigError(f"no {named(outputs)} in {config.name_or_path!r}: {told}.")
    if (missing := sorted(found["missing_keys"])) and outputs is None and not config.archive:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        told = f"its files do not hold {missing[0]}{others}, which its config.json asks for"
        raise ConfigError(f"{config.name_or_path}: {told}; copy or download it again.")


def without_head(keys: Iterable[str], outputs: list[str] | None) -> list[str]:
    """Return keys of files that are worth a warning: a model that ends in scalars has no use for an output layer."""
    return [key for key in keys if outputs is None or "lm_head" not in key]


def describe_unused(keys: Iterable[str]) -> list[str]:
    """Return a line about the tensors of a model's files that the model has no place for, if there are any."""
    if not (unused := sorted(keys)):
        return []
    others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return [f"its files hold {unused[0]}{others}, which the model of its config.json does not use"]


def log_of_model(name: str, lines: Iterable[str]) -> None:
    """Log lines about a model that is loaded; rank 0 alone does."""
    for line in lines if os.environ.get("RANK", "0") == "0" else ():
        logging.getLogger("minitrain").warning(f"{redact(name)}: {line}.")


def damage(folder: Path) -> str | None:
    """What is wrong with the first file of a model's folder that is damaged, if one is."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            return f"{path}:{error.lineno} is no valid JSON ({error.msg}); copy or download it again."
        except RecursionError:
            return f"{path} is nested too deeply; copy or download it again."
        except (OSError, ValueError):
            continue
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError):
            with open(path, "rb") as file:
                if file.read(7) == b"version":
                    return f"{path} is a pointer of Git LFS in the place of weights; fetch them with `git lfs pull`."
            try:
                safe_open(path, "pt")
            except SafetensorError as error:
                return f"{path} is damaged ({error}); copy or download it again."
    return None


def refuse_missing_weights(config: ModelConfig, outputs: list[str] | None) -> None:
    """Raise ConfigError for a local model without weights, in the words of an attempt to load it."""
    if lack := missing_weights(Path(config.name_or_path)):
        raise ConfigError(f"no {named(outputs)} in {config.name_or_path!r}: {lack}")


def missing_weights(folder: Path) -> str | None:
    """What a local model's folder lacks of its weights, if anything."""
    if not folder.is_dir():
        return None
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return None
        if index.is_file():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                lost = [folder / shard for shard in shards if not (folder / shard).is_file()]
                return f"{lost[0]} is missing, which {index.name} names; copy or download it again." if lost else None
    return f"{folder} holds no {' or '.join(WEIGHT_FILES)}; copy or download it again."


def first_line(error: Exception) -> str:
    """The first line of a message, or what it announces with a colon at its end, too."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return told.rstrip(".") + "."
