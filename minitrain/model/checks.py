"""Check the options of the model, its adapter and its quantization."""

import re
from importlib.util import find_spec
from pathlib import Path

from minitrain.config.issues import ConfigIssues, regex_error
from minitrain.config.python_objects import find_object, is_lost
from minitrain.config.schema import Config
from minitrain.io.paths import looks_local, near_file

ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def check(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Check the options of the model and its adapter.

    Args:
        config: The full config.
        given: Names of the options that are set explicitly or differ from their default.
        issues: Receives the problems.
    """
    _check_model(config, issues)
    _check_adapter(config, given, issues)


def _check_model(config: Config, issues: ConfigIssues) -> None:
    model = config.model
    key = "model.name_or_path"
    for name in ("name_or_path", "tokenizer_name_or_path"):
        if is_lost(getattr(model, name)):
            message = f"{getattr(model, name)} was given in Python. Name a folder or a Hub model, or train from Python."
            issues.add(f"model.{name}", "not-found", message)
            return
    check_folder(key, model.name_or_path, "Name its base model here, and set model.adapter={}", issues)
    if model.revision is not None and (model.name_or_path == "tiny" or looks_local(model.name_or_path)):
        issues.add("model.revision", "no-effect", "has no effect on a local model. Remove it.", key)
    tokenizer = model.tokenizer_name_or_path
    if tokenizer and looks_local(tokenizer) and not Path(tokenizer).is_dir():
        message = f"folder {tokenizer} does not exist (relative to {Path.cwd()})."
        issues.add("model.tokenizer_name_or_path", "not-found", message)
    if model.archive:
        check_archive(Path(model.archive), issues)
    for name, package in ATTENTION_PACKAGES.items():
        if model.attn_implementation == name and find_spec(package) is None:
            message = f"package {package} is not installed. Install it, or use auto."
            issues.add("model.attn_implementation", "not-installed", message)
    for entry in config.freeze_layers:
        if not re.fullmatch(r"\d+(-\d+)?|embeddings", str(entry)):
            message = f"expected block numbers, ranges such as 0-5, or embeddings, got {entry!r}."
            issues.add("freeze_layers", "invalid-value", message)
        elif entry != "embeddings" and _is_reversed(str(entry)):
            message = f"range {entry} ends before it begins. Put the smaller number first."
            issues.add("freeze_layers", "invalid-value", message)


def _is_reversed(span: str) -> bool:
    first, _, last = span.partition("-")
    return bool(last) and int(last) < int(first)


def _check_adapter(config: Config, given: set[str], issues: ConfigIssues) -> None:
    model, folder = config.model, Path(config.model.adapter or "")
    if model.adapter and not (folder / "adapter_config.json").is_file():
        inner = f" Use {folder / 'final'}." if (folder / "final" / "adapter_config.json").is_file() else ""
        message = f"{folder} is not an adapter folder: it has no adapter_config.json.{inner}"
        issues.add("model.adapter", "wrong-path", message)
    message = "has no effect with model.adapter, which has its own settings. Remove it."
    if model.adapter and "lora" in given:
        issues.add("lora", "conflict", message, "model.adapter")
    if model.adapter and "soft_prompt" in given:
        issues.add("soft_prompt", "conflict", message)
    elif "soft_prompt" in given:
        _check_prompt(config, issues)
    if "lora" in given and not model.adapter and not config.lora.rank:
        message = "has no effect without lora.rank. Set it, for example lora.rank=16."
        issues.add("lora", "no-effect", message, "lora.rank")
    _check_target_modules(config, issues)
    _check_target_parameters(config, issues)
    has_adapter = config.lora.rank > 0 or config.soft_prompt.num_virtual_tokens > 0 or model.adapter is not None
    if has_adapter and config.freeze_layers:
        message = "has no effect with an adapter, which freezes the full model. See lora.layers_to_transform."
        issues.add("freeze_layers", "no-effect", message, "lora.rank")
    if has_adapter and model.archive:
        message = "conflicts with an adapter, whose files name model.name_or_path as base. Set that to these weights."
        issues.add("model.archive", "conflict", message, "lora.rank")
    if has_adapter and model.master_dtype != "float32":
        message = "has no effect with an adapter, which is trained in float32. Remove it."
        issues.add("model.master_dtype", "no-effect", message, "lora.rank")
    if model.master_weights == "optimizer":
        _check_master_weights(config, has_adapter, issues)
    if model.quantization != "none":
        _check_quantization(config, has_adapter, issues)
    if model.float8 is not None:
        _check_float8(config, has_adapter, issues)


def _check_master_weights(config: Config, has_adapter: bool, issues: ConfigIssues) -> None:
    """Check model.master_weights=optimizer."""
    key, model = "model.master_weights", config.model
    if has_adapter:
        message = "has no effect with an adapter, which is trained in float32. Remove it."
        issues.add(key, "no-effect", message, "lora.rank")
    if model.policy_dtype == "float32":
        message = (
            "has no effect with model.policy_dtype=float32, to which nothing is rounded. Remove it, or use bfloat16."
        )
        issues.add(key, "no-effect", message, "model.policy_dtype")
    if model.master_dtype != "float32":
        message = f"conflicts with model.master_dtype={model.master_dtype}. Remove one of them."
        issues.add(key, "conflict", message, "model.master_dtype")
    if config.trainer == "FSDPTrainer":
        message = "has no effect with FSDPTrainer, which gathers blocks in policy_dtype. Remove it."
        issues.add(key, "no-effect", message, "trainer")
    if find_object(config.optimizer):
        message = "has no effect with an optimizer from Python, which gets the parameters. Remove it."
        issues.add(key, "no-effect", message, "optimizer")


def _check_target_modules(config: Config, issues: ConfigIssues) -> None:
    key, targets = "lora.target_modules", config.lora.target_modules
    is_list = isinstance(targets, list) and all(isinstance(entry, str) for entry in targets)
    if not isinstance(targets, str) and not is_list:
        issues.add(key, "wrong-type", "expected a list of names, a regular expression, or all-linear.")
    elif config.lora.rank and not targets and not config.lora.target_parameters:
        issues.add(key, "invalid-value", "is empty, so nothing would be trained. Name layers, or remove it.")
    elif isinstance(targets, str) and (error := regex_error(targets)):
        issues.add(key, "invalid-value", f"{targets!r} is not a valid regular expression: {error}.")


def _check_target_parameters(config: Config, issues: ConfigIssues) -> None:
    key, lora = "lora.target_parameters", config.lora
    is_list = isinstance(lora.target_parameters, list) and all(isinstance(e, str) for e in lora.target_parameters)
    if not is_list and lora.target_parameters != "all-experts":
        issues.add(key, "wrong-type", "expected a list of names, or all-experts.")
    if not lora.target_parameters:
        return
    conflicts = {"dropout": lora.dropout > 0, "use_dora": lora.use_dora, "init": lora.init in ("pissa", "olora")}
    for name in (name for name, conflicting in conflicts.items() if conflicting):
        message = f"has no form for parameters that are no layer. Remove it, or {key}."
        issues.add(f"lora.{name}", "conflict", message, key)


def _check_quantization(config: Config, has_adapter: bool, issues: ConfigIssues) -> None:
    key = "model.quantization"
    if not has_adapter:
        issues.add(key, "conflict", "quantized weights cannot be trained. Set lora.rank or soft_prompt.", "lora.rank")
    if find_spec("bitsandbytes") is None:
        issues.add(key, "not-installed", "package bitsandbytes is not installed. Run pip install minitrain[quant].")
    if config.trainer == "FSDPTrainer":
        message = "FSDPTrainer cannot shard quantized weights. Use trainer=BasicTrainer, or none."
        issues.add(key, "conflict", message, "trainer")
    if config.lora.init in ("pissa", "olora"):
        message = f"{config.lora.init} changes the base weights, which are quantized. Use default."
        issues.add("lora.init", "conflict", message)


def _check_float8(config: Config, has_adapter: bool, issues: ConfigIssues) -> None:
    key = "model.float8"
    if has_adapter:
        message = "conflicts with an adapter: the gradients of its frozen weights would be computed, too. Remove it."
        issues.add(key, "conflict", message, "lora.rank")
    if config.model.policy_dtype in ("float32", "float16"):
        message = f"needs model.policy_dtype=bfloat16 for what is not in FP8, got {config.model.policy_dtype}. Set it."
        issues.add(key, "conflict", message, "model.policy_dtype")
    if find_spec("torchao") is None:
        issues.add(key, "not-installed", "package torchao is not installed. Run pip install minitrain[torchao].")


def _check_prompt(config: Config, issues: ConfigIssues) -> None:
    prompt = config.soft_prompt
    if not prompt.num_virtual_tokens:
        message = "has no effect without soft_prompt.num_virtual_tokens. Set it, for example to 20."
        issues.add("soft_prompt", "no-effect", message, "soft_prompt.num_virtual_tokens")
    if config.lora.rank:
        issues.add("soft_prompt", "conflict", "conflicts with lora. Set only one.", "lora.rank")
    if prompt.method == "prefix" and prompt.init_text:
        issues.add("soft_prompt.init_text", "no-effect", "has no effect without soft_prompt.method=prompt.")
    if prompt.method == "prompt" and prompt.prefix_projection:
        issues.add("soft_prompt.prefix_projection", "no-effect", "has no effect without soft_prompt.method=prefix.")
    if prompt.encoder_hidden_size and not prompt.prefix_projection:
        message = "has no effect without soft_prompt.prefix_projection=true."
        issues.add("soft_prompt.encoder_hidden_size", "no-effect", message)


def check_folder(key: str, name: str, for_adapter: str, issues: ConfigIssues) -> None:
    """Check that the folder of a local model exists and has a model.

    Args:
        key: The option.
        name: Its value.
        for_adapter: Instruction if the folder {} has an adapter.
        issues: Receives the problems.
    """
    folder = Path(name)
    if name == "tiny" or not looks_local(name):
        return
    if not folder.is_dir():
        issues.add(key, "not-found", f"folder {folder} does not exist (relative to {Path.cwd()}).{near_file(folder)}")
    elif (folder / "final" / "config.json").is_file():
        issues.add(key, "wrong-path", f"{folder} is a run directory. Its model is {folder / 'final'}.")
    elif (folder / "adapter_config.json").is_file():
        issues.add(key, "wrong-path", f"{folder} is an adapter. {for_adapter.format(folder)}.")
    elif not (folder / "config.json").is_file():
        issues.add(key, "wrong-path", f"{folder} is not a model folder: it has no config.json.")


def check_archive(path: Path, issues: ConfigIssues) -> None:
    from minitrain.model.state_dict import archive_files

    if (path / "final").is_dir():
        issues.add("model.archive", "wrong-path", f"{path} is a run directory. Its model is {path / 'final'}.")
    elif (path / "adapter_config.json").is_file():
        issues.add("model.archive", "wrong-path", f"{path} is an adapter. Set model.adapter to it.")
    elif not archive_files(path):
        message = f"expected a .safetensors, .pt or .bin file, or a folder with model.safetensors, got {path}."
        issues.add("model.archive", "not-found", message + near_file(path))
