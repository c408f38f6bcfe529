"""Find problems in the files of a model, and describe them."""

import contextlib
import inspect
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minitrain.config.sections import ModelConfig
from minitrain.errors import ConfigError, MinitrainError
from minitrain.io.hub import unreachable_error
from minitrain.io.paths import shard_names
from minitrain.io.redact import redact

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def model_load_error(config: ModelConfig, model_type: str, error: Exception) -> ConfigError:
    """Return the error for a model that cannot be loaded; `model_type` is as from `describe_head`."""
    folder = Path(config.name_or_path)
    damaged = find_corrupt_file(folder) or missing_weights(folder)
    reason = f"cannot load a {model_type} from {config.name_or_path!r}: {damaged or first_line(error)}"
    return unreachable_error(config.name_or_path, error) or ConfigError(reason, _code(damaged, error))


def describe_head(outputs: list[str] | None) -> str:
    """Return the type of a model in words: a causal LM, or a model with a scalar head."""
    return "causal language model" if outputs is None else f"model with {len(outputs)} outputs"


def tokenizer_load_error(name: str, error: Exception) -> ConfigError:
    """Return the error for a tokenizer that cannot be loaded."""
    damaged = find_corrupt_file(Path(name))
    reason = f"cannot load a tokenizer from {name!r}: {damaged or first_line(error)}"
    return unreachable_error(name, error) or ConfigError(reason, _code(damaged, error))


def _code(damaged: str | None, error: Exception) -> str:
    if damaged:
        return "damaged-file"
    return error.code if isinstance(error, MinitrainError) else "unreadable"


def check_is_decoder(shape: Any) -> None:
    """Reject the config of an encoder such as BERT, whose tokens attend to later ones.

    transformers loads it as a causal model and only warns.

    Raises:
        ConfigError: The model is an encoder.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if shape.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(shape, "is_decoder", False):
        raise ConfigError(
            f"{shape.model_type} is an encoder, which cannot generate text. Use loss.name=classify.",
            "unsupported-model",
        )


def check_can_score(shape: Any) -> None:
    """Reject the config of an encoder-decoder such as T5, whose scores need the input of a decoder or an EOS.

    Raises:
        ConfigError: The model has an encoder and a decoder.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES

    arguments = inspect.signature(CLASSES[type(shape)].forward).parameters if type(shape) in CLASSES else ()
    if shape.is_encoder_decoder or "decoder_input_ids" in arguments:
        raise ConfigError(
            f"{shape.model_type} has an encoder and a decoder. Use an encoder or a causal language model.",
            "unsupported-model",
        )


def check_missing_keys(config: ModelConfig, loading_info: dict, outputs: list[str] | None) -> None:
    """Reject files that lack weights: transformers would initialize these at random.

    Args:
        config: The model options.
        loading_info: Loading info of transformers: missing and mismatched keys.
        outputs: Labels of a scalar head, which can be new. `name_outputs` checks the missing keys then.

    Raises:
        ConfigError: Weights are missing or have another shape.
    """
    for name, file_shape, config_shape in sorted(loading_info["mismatched_keys"]):
        reason = f"{name} must have the shape {list(config_shape)} of config.json, got {list(file_shape)}"
        raise ConfigError(f"cannot load a {describe_head(outputs)} from {config.name_or_path!r}: {reason}.", "mismatch")
    if (missing := sorted(loading_info["missing_keys"])) and outputs is None and not config.archive:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        reason = f"weights are missing in its files: {missing[0]}{others}"
        raise ConfigError(f"{config.name_or_path}: {reason}. Copy or download it again.", "damaged-file")


def drop_head_keys(keys: Iterable[str], outputs: list[str] | None) -> list[str]:
    """Return the unused keys without those of an LM head if the model has a scalar head."""
    return [key for key in keys if outputs is None or "lm_head" not in key]


def describe_unused(keys: Iterable[str]) -> list[str]:
    """Return a line about tensors in a model's files that the model does not have; empty without any."""
    if not (unused := sorted(keys)):
        return []
    others = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
    return [f"its files have {unused[0]}{others}, which the model of its config.json does not use"]


def log_model_warnings(name: str, lines: Iterable[str]) -> None:
    """Log lines about a model as warnings, on rank 0 only."""
    for line in lines:
        log_warning(f"{redact(name)}: {line}.")


def log_warning(line: str) -> None:
    """Log a warning, on rank 0 only."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("minitrain").warning(line)


def find_corrupt_file(folder: Path) -> str | None:
    """Return the problem with the first damaged file in a model's folder, or None."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            return f"{path}:{error.lineno} is not valid JSON ({error.msg}). Copy or download it again."
        except RecursionError:
            return f"{path} is nested too deeply. Copy or download it again."
        except (OSError, ValueError):
            continue
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(OSError):
            with open(path, "rb") as file:
                if file.read(7) == b"version":
                    return f"{path} is a Git LFS pointer instead of weights. Fetch them with `git lfs pull`."
            try:
                safe_open(path, "pt")
            except SafetensorError as error:
                return f"{path} is damaged ({error}). Copy or download it again."
    return None


def check_weights_exist(config: ModelConfig, outputs: list[str] | None) -> None:
    """Reject a local model without weights, with the same message as when it is loaded.

    Raises:
        ConfigError: Weight files are missing.
    """
    if reason := missing_weights(Path(config.name_or_path)):
        raise ConfigError(
            f"cannot load a {describe_head(outputs)} from {config.name_or_path!r}: {reason}", "damaged-file"
        )


def missing_weights(folder: Path) -> str | None:
    """Return a message about missing weight files in a local model's folder, or None."""
    if not folder.is_dir():
        return None
    for name in WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return None
        if index.is_file():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                missing = [folder / name for name in shard_names(index) if not (folder / name).is_file()]
                return (
                    f"{missing[0]} is missing, but {index.name} names it. Copy or download it again."
                    if missing
                    else None
                )
    return f"{folder} has no {' or '.join(WEIGHT_FILES)}. Copy or download it again."


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, and the second if the first ends with a colon."""
    text = error.message if isinstance(error, MinitrainError) else str(error)
    lines = [line.strip() for line in text.strip().splitlines()] or [type(error).__name__]
    message = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return message.rstrip(".") + "."
