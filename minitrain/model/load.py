"""Tokenizer and model from a folder, the hub or the embedded default; and back into a folder."""

import json
from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError
from ..schema import ModelConfig
from . import attention
from .policy import Policy, check_policy, find_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_HINT = (
    "If it is a hub name, it could not be reached and is not in the local cache; "
    "download it elsewhere and name the folder."
)


def load_tokenizer(config: ModelConfig):
    """The tokenizer, always with a pad token. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer

    from .tiny import tiny_tokenizer

    name = config.tokenizer_name_or_path or config.name_or_path
    if name == "tiny":
        return tiny_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:
        raise ConfigError(f"no tokenizer could be loaded from {name!r}: {_first_line(error)} {_HUB_HINT}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of {name!r} has no tokenizer.json, which minitrain needs.")
    if tokenizer.eos_token is None:
        raise ConfigError(f"the tokenizer of {name!r} has no EOS token, so no answer could end.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, tokenizer, seed: int) -> nn.Module:
    """A transformers causal LM with parameters in master_dtype and at least as many rows as the tokenizer.

    Raises ConfigError when it cannot be loaded or is no causal language model.
    """
    if config.name_or_path == "tiny":
        from .tiny import tiny_model

        model = tiny_model(seed, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
        if attention_of(config) is not None:
            model.set_attn_implementation(config.attn_implementation)
    else:
        model = _from_pretrained(config)
    for parameter in model.parameters():  # and no buffers: rotary frequencies in bfloat16 would be wrong
        parameter.data = parameter.data.to(DTYPES[config.master_dtype])
    _grow_embeddings(model, len(tokenizer))
    if config.archive:
        _load_archive(model, Path(config.archive))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def load_policy(config: ModelConfig, tokenizer, seed: int, device: torch.device, packing: bool) -> Policy:
    """The model on its device as a `Policy` whose head, and packing if asked for, were tried out."""
    policy = Policy(load_model(config, tokenizer, seed).to(device))
    if packing and policy.model.config._attn_implementation == "sdpa":
        policy.model.set_attn_implementation(attention.NAME)
    check_policy(policy, packing)
    return policy


def save_model(model: nn.Module, tokenizer, folder: Path, dtype: torch.dtype) -> None:
    """Writes what `from_pretrained` reads: weights cast once to `dtype`, tied ones once, tokenizer and template."""
    cast = {}
    for tensor in model.state_dict().values():
        cast.setdefault(_storage(tensor), tensor.detach().to(dtype) if tensor.is_floating_point() else tensor)
    state = {name: cast[_storage(tensor)] for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def freeze_layers(model: nn.Module, entries: list, dtype: torch.dtype) -> None:
    """Freezes blocks by number or range (``3``, ``"0-5"``) and ``"embeddings"``; frozen weights become `dtype`."""
    blocks = find_blocks(model.base_model)
    for entry in map(str, entries):
        if entry == "embeddings":
            frozen = [model.get_input_embeddings()]
        else:
            first, _, last = entry.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            if not numbers or numbers[-1] >= len(blocks):
                raise ConfigError(f"freeze_layers: {entry} is outside of the model's blocks 0-{len(blocks) - 1}.")
            frozen = [blocks[number] for number in numbers]
        for module in frozen:
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(dtype)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze_layers: nothing is left to train.")


def _from_pretrained(config: ModelConfig) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            config.name_or_path,
            revision=config.revision,
            dtype=DTYPES[config.master_dtype],
            attn_implementation=attention_of(config),
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:
        hint = "" if Path(config.name_or_path).exists() else f" {_HUB_HINT}"
        raise ConfigError(f"no causal language model in {config.name_or_path!r}: {_first_line(error)}{hint}") from None


def attention_of(config: ModelConfig) -> str | None:
    """What transformers is asked for; None leaves the choice to it."""
    return None if config.attn_implementation == "auto" else config.attn_implementation


def _grow_embeddings(model: nn.Module, n_tokens: int) -> None:
    """Adds rows for new tokens, each the mean of the old rows. Rows beyond the tokenizer's are never removed."""
    rows = model.get_input_embeddings().weight.shape[0]
    if rows >= n_tokens:
        return
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[rows:] = layer.weight[:rows].mean(0)


def _load_archive(model: nn.Module, path: Path) -> None:
    """Loads a state dict over the model; a .pt file may hold it under the key `state`. Never unpickles objects."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state", state)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:
        raise ConfigError(f"model.archive: {path} cannot be loaded: {_first_line(error)}") from None
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise ConfigError(
            f"model.archive: {path} does not fit {type(model).__name__}: "
            f"missing {missing[:3]}, unexpected {unexpected[:3]}."
        )


def _storage(tensor: torch.Tensor) -> tuple:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else f"{type(error).__name__}."
