"""Load a tokenizer and a model from a folder, the Hub or the built-in `tiny`."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from minitrain.config.python_objects import find_object
from minitrain.config.schema import Config
from minitrain.config.sections import ModelConfig
from minitrain.errors import ConfigError, is_failure
from minitrain.io.hub import check_hub

from . import attention, experts
from .adapter import Adapter, train_new_rows
from .adapter_config import has_adapter, read_adapter_outputs
from .adapter_files import adapt_model, load_adapter
from .decoder import find_blocks
from .diagnostics import describe_head, model_load_error, tokenizer_load_error
from .dtypes import DtypePlan
from .flops import count_flops
from .given import check_head, is_built_here, meta_copy
from .lora import merge_lora_weights
from .matrices import describe_matrices, matrix_sizes, quantized_names
from .multimodal import read_other_tensors
from .policy import Policy
from .pretrained import attention_of, from_pretrained, read_model_config
from .quantize import dequantize_model, quantize_model
from .router import make_routing
from .save import VALUE_HEAD_FILE
from .sequence_head import check_can_pack, make_policy, name_outputs
from .state_dict import load_archive, read_archive
from .token_rows import has_rows
from .vocabulary import count_ids, embedding_layers, mark_known, resize_embeddings
from .weights import Weights, open_weights, parameters_on, weight_files

CPU, META = torch.device("cpu"), torch.device("meta")
VALUE_HEAD = "value_head"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def matmul_dtype(config: ModelConfig) -> torch.dtype:
    """Return the dtype of matrix products. float32 means no autocast, so that they have the dtype of the weights.

    A run replaces `auto` by a dtype. A model that is loaded outside of a run has no autocast.
    """
    return DTYPES[config.master_dtype if config.policy_dtype in ("auto", "float32") else config.policy_dtype]


def load_tokenizer(config: ModelConfig, scores: bool = False):
    """Load a tokenizer, and set a pad token if it has none.

    Args:
        config: The model options.
        scores: The tokenizer is for a model with a scalar head. It needs no EOS, and its pad token is not the EOS:
            transformers searches for the last token that is not the pad token, and would skip the EOS.

    Raises:
        ConfigError: The tokenizer cannot be loaded, is not fast, or has no EOS.
    """
    from .tiny import tiny_tokenizer

    name = config.tokenizer_name_or_path or config.name_or_path
    if name == "tiny":
        return tiny_tokenizer()
    if entry := find_object(name):
        tokenizer = entry.value
    else:
        tokenizer = _read_tokenizer(name, config)
    mark_known(tokenizer)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"the tokenizer of {name!r} has no tokenizer.json. Save it as a fast tokenizer.", "unsupported-model"
        )
    if tokenizer.eos_token_id is None and not scores:
        raise ConfigError(
            f"the tokenizer of {name!r} has no EOS token, so responses cannot end. Set eos_token in its config.",
            "unsupported-model",
        )
    if scores and tokenizer.pad_token in (None, tokenizer.eos_token):
        others = (tokenizer.unk_token, tokenizer.bos_token)
        pad_token = next((token for token in others if token not in (None, tokenizer.eos_token)), "<|pad|>")
        tokenizer.add_special_tokens({"pad_token": pad_token})
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _read_tokenizer(name: str, config: ModelConfig):
    from transformers import AutoTokenizer

    check_hub(name)
    try:
        return AutoTokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise tokenizer_load_error(name, error) from None


def load_model(
    config: ModelConfig,
    tokenizer,
    seed: int,
    dtype: torch.dtype | None = None,
    outputs: list[str] | None = None,
    device: torch.device = CPU,
) -> nn.Module:
    """Load a transformers model whose embeddings have a row for every token id.

    Args:
        config: The model options.
        tokenizer: The tokenizer that the model is trained with.
        seed: Seed of weights that are not in the files.
        dtype: Dtype of the parameters; `model.master_dtype` by default.
        outputs: Labels of a scalar head; None loads a causal LM.
        device: The CPU, or the meta device to read no weights.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    dtype = dtype or DTYPES[config.master_dtype]
    with parameters_on(device):
        model = _pretrained(config, tokenizer, seed, dtype, outputs, device)
        resize_embeddings(model, tokenizer)
    if config.archive and device.type != "meta":
        load_archive(model, Path(config.archive))
    return model


def _pretrained(
    config: ModelConfig, tokenizer, seed: int, dtype: torch.dtype, outputs: list[str] | None, device: torch.device
) -> nn.Module:
    """Return a model before its embeddings are resized."""
    if config.name_or_path == "tiny":
        from .tiny import tiny_model, tiny_scorer

        model = tiny_model(seed, count_ids(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
        model = model if outputs is None else tiny_scorer(model, len(outputs), seed)
        missing = ["score.weight"]
    elif entry := find_object(config.name_or_path):
        model, missing = entry.value if device.type != "meta" else meta_copy(entry.value), []
        check_head(model, outputs)
    else:
        model, missing = from_pretrained(config, dtype, outputs, seed, device)
    if is_built_here(config):
        model.load_notes, model.other_tensors = [], None
        if attention_of(config) is not None:
            model.set_attn_implementation(config.attn_implementation)
    if outputs is not None:
        name_outputs(model, outputs, tokenizer.pad_token_id, missing)
    plan = DtypePlan(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(plan(name, parameter))
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _open_model(config: ModelConfig, tokenizer, dtype: torch.dtype) -> tuple[nn.Module, Weights | None]:
    """Return the model of `load_model` on the meta device, and its weights; None if the files do not match it."""
    with parameters_on(META):
        model = _pretrained(config, tokenizer, 0, dtype, None, META)
        try:
            weights = open_weights(config.name_or_path, config.revision, model)
        except Exception as error:
            raise model_load_error(config, describe_head(None), error) from None
        if weights is not None:
            read_other_tensors(model, weight_files(config.name_or_path, config.revision), {})
            resize_embeddings(model, tokenizer, weights)
    if weights is not None and config.archive:
        state = read_archive(model, Path(config.archive))
        weights.replace({name: state[name] for name, _ in model.named_parameters() if name in state})
    return model, weights


def build_policy(
    config: Config,
    tokenizer,
    device: torch.device = CPU,
    sharded: bool = False,
    outputs: list[str] | None = None,
    value_head: bool = False,
    quantized: bool = True,
) -> tuple[Policy, Weights | None]:
    """Build the policy: the model with its adapter and frozen layers.

    Args:
        config: The full config.
        tokenizer: The tokenizer that the model is trained with.
        device: Device of quantized layers; the rest is on the CPU. On the meta device, no weights are read.
        sharded: Keep parameters on the meta device if the files allow it, so that each rank reads only its shards.
        outputs: Labels of a scalar head; None builds a causal LM.
        value_head: Add a value head next to the LM head.
        quantized: Quantize the model if the config says so.

    Returns:
        The policy, and its weights if `sharded` has put it on the meta device, else None.

    Raises:
        ConfigError: The model or its adapter cannot be loaded, or does not match the options.
    """
    frozen_dtype = matmul_dtype(config.model)
    dtype = frozen_dtype if has_adapter(config) else DTYPES[config.model.master_dtype]
    weights = None
    if sharded and outputs is None and not is_built_here(config.model):
        model, weights = _open_model(config.model, tokenizer, dtype)
    if weights is None:
        model = load_model(config.model, tokenizer, config.seed, dtype, outputs, device)
    sizes, packed = matrix_sizes(model), set() if config.model.quantization == "none" else quantized_names(model)
    with parameters_on(device):
        if packed and quantized:
            quantize_model(model, config.model.quantization, frozen_dtype, device)
        if has_adapter(config):
            model.adapter = adapt_model(config, model, tokenizer, weights)
            model.adapter.freeze(model, frozen_dtype)
        policy = make_policy(model)
        policy.routing = make_routing(model, config.model.router_aux_loss_coef)
        check_can_pack(model, config.packing)
        if value_head:
            policy.add_value_head()
    if value_head and device.type != "meta":
        load_value_head(policy.value_head, config.model)
    if value_head and weights is not None:
        weights.replace(policy.value_head.state_dict(prefix=f"{VALUE_HEAD}."))
    freeze_layers(model, config.freeze_layers, frozen_dtype, weights)
    model.matrices = describe_matrices(model, sizes, packed)
    policy.flops = count_flops(model, sizes)
    if config.packing:
        attention.attend_by_document(model)
    return policy, weights


def build_frozen(
    config: ModelConfig,
    tokenizer,
    dtype: torch.dtype,
    packing: bool,
    residual: torch.dtype,
    device: torch.device = CPU,
) -> Policy:
    """Build a frozen reference or teacher model. An adapter is merged.

    Args:
        config: The model options.
        tokenizer: The tokenizer that the policy is trained with.
        dtype: Dtype of the weights.
        packing: Prepare attention for packed rows.
        residual: Dtype of the residual stream.
        device: The CPU, or the meta device to read no weights.
    """
    if config.adapter:
        model = load_merged(config, tokenizer).to(dtype)
    else:
        model = load_model(config, tokenizer, 0, dtype, device=device)
    policy = make_policy(model.eval().requires_grad_(False))
    if dtype != residual:  # like autocast, which only lowers the precision of matrix products
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.to(residual))
    if packing:
        attention.attend_by_document(model)
    return policy


def load_value_head(head: nn.Linear, config: ModelConfig) -> None:
    """Load the value head in the folder of the adapter or of the model, if there is one."""
    files = [Path(folder) / VALUE_HEAD_FILE for folder in (config.adapter, config.name_or_path) if folder]
    if file := next((file for file in files if file.is_file()), None):
        head.load_state_dict(load_file(file))


def load_base(config: ModelConfig, tokenizer) -> nn.Module:
    """Load the base model of an adapter in float32, with the rounded weights of a quantized training."""
    model = load_model(config, tokenizer, 0, torch.float32, trained_outputs(config))
    if config.quantization != "none":
        quantize_model(model, config.quantization, torch.float32, CPU)
        dequantize_model(model)
    return model


def load_merged(config: ModelConfig, tokenizer) -> nn.Module:
    """Load a model in float32 with the adapter of the config merged into its weights."""
    model = load_base(config, tokenizer)
    merge_adapter(model, Path(config.adapter))
    return model


def merge_adapter(model: nn.Module, folder: Path) -> Adapter:
    """Merge the adapter in a folder into the weights of its base model, and return it."""
    adapter = load_adapter(model, folder)
    for module in list(model.modules()):
        if hasattr(module, "lora") or has_rows(module):
            merge_lora_weights(module)
        elif experts.is_wrapped(module):
            experts.merge_experts(module)
    return adapter


def freeze_layers(model: nn.Module, entries: list, dtype: torch.dtype, weights: Weights | None = None) -> None:
    """Freeze blocks and embeddings of a model. Embedding rows of new tokens are always trained.

    Args:
        model: The transformers model.
        entries: Block numbers (``3``), ranges (``"0-5"``) and ``"embeddings"``.
        dtype: Dtype of frozen weights.
        weights: Weights of a model on the meta device.

    Raises:
        ConfigError: A block does not exist, or no parameter is left to train.
    """
    blocks, plan = find_blocks(model), DtypePlan(model, dtype)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for entry in map(str, entries):
        if entry == "embeddings":
            frozen = [model.get_input_embeddings()]
        else:
            first, _, last = entry.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            if not numbers or numbers[-1] >= len(blocks):
                raise ConfigError(
                    f"freeze_layers: {entry} is out of range. The model has blocks 0-{len(blocks) - 1}.", "out-of-range"
                )
            frozen = [blocks[number] for number in numbers]
        for module in frozen:
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(plan(names[id(parameter)], parameter))
    if "embeddings" in entries:
        layers = embedding_layers(model)
        train_new_rows(model, None, [name for name in layers if layers[name].weight.requires_grad], weights)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("freeze_layers: nothing is left to train. Freeze fewer layers.", "invalid-value")


def trained_outputs(config: ModelConfig) -> list[str] | None:
    """Return the labels of a trained model or adapter from its files; None for a causal LM.

    Raises:
        ConfigError: The files cannot be read.
    """
    if config.adapter:
        return read_adapter_outputs(Path(config.adapter))
    if config.name_or_path == "tiny":
        return None
    try:
        saved = read_model_config(config)
    except Exception as error:
        raise model_load_error(config, "model", error) from None
    has_scalar_head = any(name.endswith("ForSequenceClassification") for name in saved.architectures or ())
    return [saved.id2label[number] for number in range(saved.num_labels)] if has_scalar_head else None
