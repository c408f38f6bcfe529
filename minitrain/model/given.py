"""Accept a model or a tokenizer object from Python instead of a name."""

import copy
import hashlib
import json
from typing import Any

import torch

from minitrain.config.python_objects import PythonObject, find_object, python_object
from minitrain.config.sections import ModelConfig
from minitrain.errors import ConfigError


def model_object(model: Any) -> PythonObject:
    """Register a model as an object that a config can name. Raises ConfigError if it cannot be trained."""
    from transformers import PreTrainedModel

    type_name = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
    if isinstance(model, str):
        raise ConfigError(
            f"model: expected a model, got {model!r}. Set model.name_or_path in the config.", "wrong-type"
        )
    if hasattr(model, "peft_config"):
        advice = "Pass its base model and set lora, or save the adapter and set model.adapter."
        raise ConfigError(f"model: {type_name} has a PEFT adapter. {advice}", "unsupported-model")
    if not isinstance(model, PreTrainedModel):
        advice = "Pass a model such as AutoModelForCausalLM.from_pretrained(...) returns."
        raise ConfigError(f"model: expected a transformers model, got {type_name}. {advice}", "wrong-type")
    if getattr(model, "hf_quantizer", None) is not None:
        advice = "Load it without a quantization_config, and set model.quantization."
        raise ConfigError(f"model: {type_name} is quantized. {advice}", "unsupported-model")
    if hasattr(model, "adapter") or any(hasattr(module, "lora") for module in model.modules()):
        advice = "Load the model again, or resume from a checkpoint."
        raise ConfigError(f"model: {type_name} already has an adapter of minitrain. {advice}", "unsupported-model")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ConfigError(
            f"model: {type_name} has tensors on the meta device. Load its weights first.", "unsupported-model"
        )
    return python_object(model, "model", f"model {type_name}, sha256 {_state_hash(model)}")


def tokenizer_object(tokenizer: Any) -> PythonObject:
    """Register a copy of a tokenizer, since training can add tokens. Raises ConfigError if it cannot be used."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        advice = "Pass a tokenizer such as AutoTokenizer.from_pretrained(...) returns."
        got = repr(tokenizer) if isinstance(tokenizer, str) else type(tokenizer).__name__
        raise ConfigError(f"tokenizer: expected a tokenizer, got {got}. {advice}", "wrong-type")
    if not tokenizer.is_fast:
        raise ConfigError("tokenizer: is not a fast tokenizer. Pass one with a tokenizer.json.", "unsupported-model")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    content = [backend | {"padding": None, "truncation": None}, tokenizer.chat_template]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return python_object(
        copy.deepcopy(tokenizer), "tokenizer", f"tokenizer {type(tokenizer).__name__}, sha256 {digest}"
    )


def is_built_here(config: ModelConfig) -> bool:
    """Return whether a model is built in or from Python, so that it has no files."""
    return config.name_or_path == "tiny" or find_object(config.name_or_path) is not None


def meta_copy(model: Any) -> Any:
    """Return a model with the same config on the meta device. Call it inside `parameters_on_meta`."""
    return type(model)(copy.deepcopy(model.config))


def check_head(model: Any, outputs: list[str] | None) -> None:
    """Check that a model from Python has the head that the loss needs.

    Args:
        model: The transformers model.
        outputs: Labels of a scalar head; None for a causal LM.

    Raises:
        ConfigError: It has another head, or another number of labels.
    """
    type_name = type(model).__name__
    if outputs is None and not model.can_generate():
        advice = "Pass a causal language model, such as AutoModelForCausalLM.from_pretrained(...) returns."
        raise ConfigError(f"model: {type_name} has no LM head. {advice}", "unsupported-model")
    if outputs is not None and not type_name.endswith("ForSequenceClassification"):
        advice = f"Pass a model of AutoModelForSequenceClassification with num_labels={len(outputs)}."
        raise ConfigError(f"model: {type_name} has no scalar head. {advice}", "unsupported-model")
    if outputs is not None and model.num_labels != len(outputs):
        labels = f"{model.num_labels} labels, but the loss needs {len(outputs)}: {', '.join(outputs)}"
        raise ConfigError(f"model: {type_name} has {labels}. Load it with num_labels={len(outputs)}.", "mismatch")


def _state_hash(model: Any) -> str:
    """Return a hash of a model's config and of all its tensors."""
    shape = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    digest = hashlib.sha256(repr(sorted(shape.items(), key=lambda item: item[0])).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
