"""Checks of the options of devices and processes."""

import os

from minitrain.config.issues import ConfigIssues
from minitrain.config.schema import Config
from minitrain.errors import ConfigError

from .process import world_size

FLOAT8_CAPABILITY = (8, 9)


def check_processes(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """Check `trainer` and `fsdp` against the number of processes.

    Args:
        given: Names of the options that are set, or not at their default.
    """
    processes, local = world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if config.trainer == "BasicTrainer":
        if processes > 1:
            issues.add(
                "trainer",
                "conflict",
                f"BasicTrainer trains on one device, but torchrun started {processes} processes. "
                "Set trainer=FSDPTrainer.",
            )
        if "fsdp" in given:
            issues.add(
                "fsdp", "no-effect", "has no effect without trainer=FSDPTrainer. Set it, or remove fsdp.", "trainer"
            )
    elif config.fsdp.shard == "hybrid" and (processes == local or processes % local):
        issues.add(
            "fsdp.shard",
            "conflict",
            "hybrid needs several machines with the same number of processes. Use full on one.",
        )


def check_device(config: Config, issues: ConfigIssues) -> None:
    import torch

    from .parallel import pick_device

    try:
        device = pick_device(config.device).type
    except ConfigError as error:
        issues.add("device", error.code, error.message.removeprefix("device: "))
        return
    if config.model.float8 is not None and (device != "cuda" or torch.cuda.get_device_capability() < FLOAT8_CAPABILITY):
        name = torch.cuda.get_device_name() if device == "cuda" else device
        message = f"needs a GPU of compute capability 8.9 or higher, such as L4 or H100, got {name}. Remove it."
        issues.add("model.float8", "no-device", message, "device")
    if config.activation_offload and device != "cuda":
        issues.add("activation_offload", "no-effect", f"has no effect with device={device}. Remove it.")
    if config.trainer == "BasicTrainer":
        return
    local, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device == "mps":
        issues.add(
            "trainer",
            "conflict",
            "FSDPTrainer supports CUDA devices and the CPU, not MPS. Set device=cpu, or trainer=BasicTrainer.",
        )
    if device == "cuda" and local > n_gpus:
        issues.add(
            "trainer",
            "conflict",
            f"torchrun started {local} processes on a machine with {n_gpus} GPUs. Start one per GPU.",
        )
    if config.fsdp.cpu_offload and device == "cpu":
        issues.add("fsdp.cpu_offload", "no-effect", "has no effect with device=cpu. Remove it.")


def uneven_batch(config: Config, number: int, what: str) -> str | None:
    """Return what is wrong with the batch size on `number` processes or devices, or None."""
    if config.total_batch_size % (config.gradient_accumulation_steps * number) == 0:
        return None
    over = f" on each of {number} {what}" if number > 1 else ""
    return (
        f"{config.total_batch_size} examples cannot be split into gradient_accumulation_steps="
        f"{config.gradient_accumulation_steps} equal micro-batches{over}. Change one of them."
    )
