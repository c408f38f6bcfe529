"""Optimizers by name, and parameter groups."""

import inspect
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from minitrain.config.issues import format_value
from minitrain.config.python_objects import PythonObject, find_object, python_object
from minitrain.config.schema import Config
from minitrain.config.suggest import suggest
from minitrain.distributed.parallel import is_sharded
from minitrain.errors import ConfigError

from .optimizers import InBackward, Joint, LocalRows, MasterWeights, Muon, local_rows, round_to

Builder = Callable[..., torch.optim.Optimizer]
FASTER = ("lora_B", "lora_embedding_B")  # by lora.loraplus_lr_ratio
UNFIT = {"Optimizer", "LBFGS", "SparseAdam"}  # they need more than gradients, or support only some parameters
EXTRAS = {"bitsandbytes": "quant", "torchao": "torchao"}  # package -> the extra of minitrain that installs it


def optimizer_class(name: str) -> Builder:
    """Return a class of torch.optim by its case-insensitive name, Muon with AdamW, or what an import path names.

    Raises:
        ConfigError: The name is unknown, or its package is not installed.
    """
    if "." in name:
        return _imported(name)
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key not in UNFIT
    }
    classes["Muon"] = Muon
    chosen = {key.lower(): value for key, value in classes.items()}.get(name.lower())
    if chosen is None:
        raise ConfigError(
            f"{name!r} is not a supported class of torch.optim. Use one of {', '.join(sorted(classes))}, or an import "
            "path such as bitsandbytes.AdamW8bit.",
            "not-a-choice",
        )
    return chosen


def _imported(path: str) -> Builder:
    """Return what `package.module.Class` names; `package.Class` may stand for `package.optim.Class`."""
    module_name, _, name = path.rpartition(".")
    package = path.partition(".")[0]
    if not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"expected package.module.Class, got {path!r}. Correct it.", "invalid-value")
    if package != "__main__" and find_spec(package) is None:
        extra = f"minitrain[{EXTRAS[package]}]" if package in EXTRAS else package
        raise ConfigError(f"package {package} is not installed. Run pip install {extra}.", "not-installed")
    modules = [module_name, f"{package}.optim"] if module_name == package else [module_name]
    known: list[str] = []
    for module in modules:
        try:
            found = vars(import_module(module))
        except ImportError as error:
            if module == module_name:
                raise ConfigError(f"{module} cannot be imported: {error}. Correct it.", "not-found") from None
            continue
        if callable(found.get(name)):
            if name in UNFIT and found[name].__module__.startswith("torch."):
                raise ConfigError(f"{path} needs more than gradients. Use AdamW.", "not-a-choice")
            return found[name]
        known += [key for key, value in found.items() if callable(value)]
    raise ConfigError(f"{module_name} has no class {name!r}.{suggest(name, known) or ' Correct it.'}", "not-found")


def accepted_options(chosen: Builder) -> list[str]:
    """Return the names of an optimizer's options. `eps` is left out where it has another meaning than in Adam."""
    names = list(inspect.signature(chosen).parameters)
    return names if "betas" in names else [name for name in names if name != "eps"]


def takes_local_rows(chosen: Builder) -> bool:
    """Return whether an optimizer gets this rank's rows of sharded parameters: it updates blocks of values alone."""
    return chosen.__module__.partition(".")[0] in EXTRAS


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Build the optimizer over all trained parameters. Weight decay applies to those with two or more dimensions."""
    if given := find_object(config.optimizer):
        return _call_factory(given.value, model, config)
    chosen = optimizer_class(config.optimizer)
    groups = _parameter_groups(model, config)
    parameters = [parameter for group in groups for parameter in group["params"]]
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    if config.model.master_weights == "optimizer":
        from minitrain.model.load import DTYPES  # imports transformers

        dtype, rounded = DTYPES[config.model.policy_dtype], autocast_weights(model)
        stand_ins = {p: round_to(dtype, p) if p in rounded else p for p in parameters}
    elif takes_local_rows(chosen) and any(map(is_sharded, parameters)):
        stand_ins = {p: local_rows(p) for p in parameters}
    groups = [group | {"params": [stand_ins.get(p, p) for p in group["params"]]} for group in groups]
    wrap = MasterWeights if config.model.master_weights == "optimizer" else LocalRows
    try:
        if not config.optimizer_in_backward:
            optimizer = _make(chosen, groups, config)
            return wrap(optimizer, stand_ins) if stand_ins else optimizer
        single = [group | {"params": [p]} for group in groups for p in group["params"]]
        joint = Joint(_make(chosen, [group], config) for group in single)
        optimizer = wrap(joint, stand_ins) if stand_ins else joint
        return InBackward(optimizer, dict(zip(parameters, joint.parts, strict=True)))
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"optimizer: {chosen.__name__} rejects its options ({error}). Change optimizer_args.", "invalid-value"
        ) from None


def _parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Return groups of trained parameters that differ in learning rate, weight decay, or in whether Muon fits."""
    matrices = hidden_matrices(model) if optimizer_class(config.optimizer) is Muon else set()
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = config.lora.loraplus_lr_ratio if name.endswith(FASTER) else 1.0
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((ratio, decay, parameter in matrices), []).append(parameter)
    keys = ("lr_ratio", "weight_decay", "is_matrix")
    return [{"params": parameters, **dict(zip(keys, key, strict=True))} for key, parameters in groups.items()]


def _make(chosen: Builder, groups: list[dict[str, Any]], config: Config) -> torch.optim.Optimizer:
    """Return an optimizer of parameter groups."""
    accepted = accepted_options(chosen)
    fused = "betas" in accepted  # for sharded parameters, PyTorch has a fused step for Adam only
    options = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps, "fused": fused}
    arguments = {key: value for key, value in options.items() if key in accepted} | config.optimizer_args
    unknown = {"is_matrix"} if chosen is not Muon else set()
    unknown |= {"weight_decay"} if "weight_decay" not in accepted else set()
    optimizer = chosen([{k: v for k, v in group.items() if k not in unknown} for group in groups], **arguments)
    if not all("lr" in group for group in optimizer.param_groups):
        raise ValueError("its parameter groups have no lr")
    first = groups[0]["params"][0]
    if chosen.__module__.startswith("torchao.") and first.device.type == "cpu":
        # It compiles its step for each shape, which needs a C++ compiler on a CPU.
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the matrices in the blocks that features are multiplied with: weights of linear layers, and LoRA."""
    lora = {p for module in _in_blocks(model) for name, p in module._parameters.items() if name in ("lora_A", "lora_B")}
    return {p for p in autocast_weights(model) | lora if p is not None and p.ndim == 2}


def autocast_weights(model: nn.Module) -> set[nn.Parameter]:
    """Return the weights of the linear layers in the blocks. Autocast rounds them, and nothing else reads them."""
    from minitrain.model.affine import affine_class  # imports transformers

    return {module.weight for module in _in_blocks(model) if affine_class(module, type(module)) is not None}


def _in_blocks(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list({id(inner): inner for each in lists for inner in each.modules()}.values())


def optimizer_object(factory: Any) -> PythonObject:
    """Wrap a function that builds an optimizer, so that a config can refer to it. Raise ConfigError."""
    if isinstance(factory, (torch.optim.Optimizer, str)) or not callable(factory):
        raise ConfigError(
            f"optimizer: expected a function of the list of trained parameters, got {format_value(factory)}. "
            "Pass, for example, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), or set the name of "
            "a class of torch.optim in the config.",
            "wrong-type",
        )
    function = getattr(factory, "func", factory)  # unwrap a functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    options = ", ".join(f"{key}={value!r}" for key, value in getattr(factory, "keywords", {}).items())
    module = getattr(function, "__module__", type(function).__module__)
    return python_object(factory, "optimizer", f"optimizer {module}.{name}({options})")


def _call_factory(factory: Callable, model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer that a user's function builds. The lr of each parameter group is its peak."""
    try:
        optimizer = factory([parameter for parameter in model.parameters() if parameter.requires_grad])
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise ConfigError(
            f"optimizer: the function failed: {type(error).__name__}: {error}", "invalid-value"
        ) from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        name = type(optimizer).__name__
        raise ConfigError(f"optimizer: the function returned {name}. Return a torch.optim.Optimizer.", "wrong-type")
    for group in optimizer.param_groups:
        group["lr_ratio"] = group["lr"] / config.lr if config.lr else 0.0
    return optimizer


def check_optimizer(config: Config, on_cpu: bool) -> None:
    """Raise ConfigError for options that the optimizer rejects, by building it over a small layer.

    Args:
        on_cpu: Whether the run trains on a CPU. An optimizer that is imported then takes a step, which not all can.
    """
    model = nn.ModuleList([nn.Linear(64, 64)])  # in blocks, and large enough for 8 bits
    optimizer = build_optimizer(model, config)
    if not on_cpu or "." not in config.optimizer:
        return
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.step()
    except Exception as error:
        raise ConfigError(
            f"optimizer: {config.optimizer} cannot take a step on a CPU ({type(error).__name__}: {error}). Use AdamW.",
            "invalid-value",
        ) from None
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        if changed := [key for key in group if key != "params" and group[key] != before.get(key)]:
            raise ConfigError(
                f"optimizer: {config.optimizer} changes {', '.join(changed)} of its groups, which no checkpoint has. "
                "Use AdamW.",
                "invalid-value",
            )


def warmup_steps(config: Config, total: int) -> int:
    """Return the number of warmup steps. Raise ConfigError if the learning rate would not reach its peak."""
    if config.warmup_steps > total:
        raise ConfigError(
            f"warmup_steps: {config.warmup_steps} is more than the {total} steps of n_epochs={config.n_epochs:g}. "
            "Lower it, or use warmup_ratio.",
            "out-of-range",
        )
    return config.warmup_steps or round(config.warmup_ratio * total)
