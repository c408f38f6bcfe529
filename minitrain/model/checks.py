"""Check the options of the model, its adapter and its quantization."""

import re
from pathlib import Path

from minitrain.config.issues import ConfigIssues
from minitrain.config.python_objects import is_lost
from minitrain.config.schema import Config
from minitrain.io.paths import looks_local, near_file

ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def check(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Add to `issues` what is wrong with the options of the model.

    Args:
        config: The full config.
        given: Names of the options that were written or are not at their default.
        issues: Where problems are added.
    """
    _check_model(config, issues)
    _check_adapter(config, given, issues)


def _check_model(config: Config, issues: ConfigIssues) -> None:
    from importlib.util import find_spec

    model = config.model
    key = "model.name_or_path"
    for name in ("name_or_path", "tokenizer_name_or_path"):
        if is_lost(getattr(model, name)):
            message = f"{getattr(model, name)} was given in Python. Name a folder or a Hub model, or train from Python."
            issues.add(f"model.{name}", "not-found", message)
            return
    check_folder(key, model.name_or_path, "name its base model here, and model.adapter={}", issues)
    if model.revision is not None and (model.name_or_path == "tiny" or looks_local(model.name_or_path)):
        issues.add("model.revision", "no-effect", "would be ignored: the model does not come from the hub.", key)
    tokenizer = model.tokenizer_name_or_path
    if tokenizer and looks_local(tokenizer) and not Path(tokenizer).is_dir():
        issues.add(
            "model.tokenizer_name_or_path", "not-found", f"there is no folder {tokenizer} (seen from {Path.cwd()})."
        )
    if model.archive:
        check_archive(Path(model.archive), issues)
    for name, package in ATTENTION_PACKAGES.items():
        if model.attn_implementation == name and find_spec(package) is None:
            issues.add(
                "model.attn_implementation", "not-installed", f"the package {package} is not installed; use auto."
            )
    for entry in config.freeze_layers:
        if not re.fullmatch(r"\d+(-\d+)?|embeddings", str(entry)):
            issues.add(
                "freeze_layers", "invalid-value", f"{entry!r} is neither a number, a range like 0-5, nor `embeddings`."
            )
        elif entry != "embeddings" and _is_reversed(str(entry)):
            issues.add(
                "freeze_layers",
                "invalid-value",
                f"the range {entry} ends before it begins. Write the smaller number first.",
            )


def _is_reversed(span: str) -> bool:
    first, _, last = span.partition("-")
    return bool(last) and int(last) < int(first)


def _check_adapter(config: Config, given: set[str], issues: ConfigIssues) -> None:
    from importlib.util import find_spec

    model, folder = config.model, Path(config.model.adapter or "")
    if model.adapter and not (folder / "adapter_config.json").is_file():
        inner = f" Its adapter is {folder / 'final'}." if (folder / "final" / "adapter_config.json").is_file() else ""
        issues.add("model.adapter", "wrong-path", f"{folder} holds no adapter_config.json, so it is no adapter.{inner}")
    if model.adapter and "lora" in given:
        issues.add(
            "lora", "conflict", "would be ignored beside model.adapter, which says itself what it is.", "model.adapter"
        )
    if model.adapter and "soft_prompt" in given:
        issues.add("soft_prompt", "conflict", "would be ignored beside model.adapter, which says itself what it is.")
    elif "soft_prompt" in given:
        _check_prompt(config, issues)
    if "lora" in given and not model.adapter and not config.lora.rank:
        issues.add("lora", "no-effect", "would be ignored: it needs lora.rank, for example lora.rank=16.", "lora.rank")
    targets = config.lora.target_modules
    if not isinstance(targets, str) and not (
        isinstance(targets, list) and all(isinstance(entry, str) for entry in targets)
    ):
        issues.add(
            "lora.target_modules", "wrong-type", "expected names in a list, a regular expression, or all-linear."
        )
    elif config.lora.rank and not targets:
        issues.add(
            "lora.target_modules",
            "invalid-value",
            "is empty, so that nothing would be trained. Name layers, or leave it out.",
        )
    elif isinstance(targets, str) and (error := _regex_error(targets)):
        issues.add("lora.target_modules", "invalid-value", f"{targets!r} is no regular expression: {error}.")
    has_adapter = config.lora.rank > 0 or config.soft_prompt.num_virtual_tokens > 0 or model.adapter is not None
    if has_adapter and config.freeze_layers:
        message = "would be ignored: with an adapter the whole model is frozen. See lora.layers_to_transform."
        issues.add("freeze_layers", "no-effect", message, "lora.rank")
    if has_adapter and model.archive:
        message = (
            "would be lost: an adapter's files name model.name_or_path as its base. Name a folder with these weights "
        )
        issues.add("model.archive", "conflict", message + "there, and leave model.archive out.", "lora.rank")
    if has_adapter and model.master_dtype != "float32":
        issues.add("model.master_dtype", "no-effect", "would be ignored: adapters are trained in float32.", "lora.rank")
    if model.quantization == "none":
        return
    if not has_adapter:
        message = "quantised weights cannot be trained; it needs lora.rank or soft_prompt."
        issues.add("model.quantization", "conflict", message, "lora.rank")
    if find_spec("bitsandbytes") is None:
        issues.add(
            "model.quantization",
            "not-installed",
            "the package bitsandbytes is not installed: pip install minitrain[quant]",
        )
    if config.trainer == "FSDPTrainer":
        message = "bitsandbytes packs weights so that FSDP2 cannot cut them by rows; use trainer=BasicTrainer, or none."
        issues.add("model.quantization", "conflict", message, "trainer")
    if config.lora.init in ("pissa", "olora"):
        issues.add("lora.init", "conflict", f"{config.lora.init} changes the weights, which quantisation has packed.")


def _check_prompt(config: Config, issues: ConfigIssues) -> None:
    prompt = config.soft_prompt
    if not prompt.num_virtual_tokens:
        message = "would be ignored: it needs soft_prompt.num_virtual_tokens, for example 20."
        issues.add("soft_prompt", "no-effect", message, "soft_prompt.num_virtual_tokens")
    if config.lora.rank:
        issues.add("soft_prompt", "conflict", "cannot be trained together with lora; give one of them.", "lora.rank")
    if config.packing:
        message = (
            "examples of one row would need prompts of their own; set packing=false (group_by_length saves padding)."
        )
        issues.add("packing", "conflict", message, "soft_prompt")
    if prompt.method == "prefix" and prompt.init_text:
        issues.add("soft_prompt.init_text", "no-effect", "would be ignored: it needs soft_prompt.method=prompt.")
    if prompt.method == "prompt" and prompt.prefix_projection:
        issues.add(
            "soft_prompt.prefix_projection", "no-effect", "would be ignored: it needs soft_prompt.method=prefix."
        )
    if prompt.encoder_hidden_size and not prompt.prefix_projection:
        message = "would be ignored: it needs soft_prompt.prefix_projection=true."
        issues.add("soft_prompt.encoder_hidden_size", "no-effect", message)


def check_folder(key: str, name: str, for_adapter: str, issues: ConfigIssues) -> None:
    """Add a problem if a local model's folder is missing or not a model.

    Args:
        key: The option.
        name: Its value.
        for_adapter: What to do if the folder {} has an adapter.
        issues: Where problems are added.
    """
    folder = Path(name)
    if name == "tiny" or not looks_local(name):
        return
    if not folder.is_dir():
        issues.add(key, "not-found", f"there is no folder {folder} (seen from {Path.cwd()}).{near_file(folder)}")
    elif (folder / "final" / "config.json").is_file():
        issues.add(key, "wrong-path", f"{folder} is the folder of a run; its model is {folder / 'final'}.")
    elif (folder / "adapter_config.json").is_file():
        issues.add(key, "wrong-path", f"{folder} is an adapter; {for_adapter.format(folder)}.")
    elif not (folder / "config.json").is_file():
        issues.add(key, "wrong-path", f"{folder} holds no config.json, so it is not a model's folder.")


def check_archive(path: Path, issues: ConfigIssues) -> None:
    from minitrain.model.state_dict import archive_files

    if (path / "final").is_dir():
        issues.add("model.archive", "wrong-path", f"{path} is the folder of a run; its model is {path / 'final'}.")
    elif (path / "adapter_config.json").is_file():
        issues.add("model.archive", "wrong-path", f"{path} is an adapter; name it as model.adapter.")
    elif not archive_files(path):
        message = f"{path} is not a .safetensors, .pt or .bin file that exists, nor a folder with model.safetensors."
        issues.add("model.archive", "not-found", message + near_file(path))


def _regex_error(expression: str) -> str | None:
    """Return what is wrong with a regular expression, or None."""
    try:
        re.compile(expression)
    except re.error as error:
        return str(error)
    return None
