"""Check the options of devices and processes."""

import os

from minitrain.config.issues import ConfigIssues
from minitrain.config.schema import Config
from minitrain.errors import ConfigError

from .process import world_size


def check_processes(config: Config, given: set[str], issues: ConfigIssues) -> None:
    """`given`: names of the options that were written or are not at their default."""
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
            issues.add("fsdp", "no-effect", "would be ignored: it needs trainer=FSDPTrainer.", "trainer")
    elif config.fsdp.shard == "hybrid" and (processes == local or processes % local):
        issues.add(
            "fsdp.shard", "conflict", "hybrid needs several machines with equally many processes; use full on one."
        )


def check_device(config: Config, issues: ConfigIssues) -> None:
    import torch

    from .parallel import pick_device

    try:
        device = pick_device(config.device).type
    except ConfigError as error:
        issues.add("device", error.code, error.message.removeprefix("device: ") + ".")
        return
    if config.trainer == "BasicTrainer":
        return
    local, n_gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device == "mps":
        issues.add("trainer", "conflict", "FSDPTrainer needs CUDA devices or the CPU; use device=cpu, or BasicTrainer.")
    if device == "cuda" and local > n_gpus:
        issues.add(
            "trainer", "conflict", f"torchrun started {local} processes on this machine, but it has {n_gpus} GPUs."
        )
    if config.fsdp.cpu_offload and device == "cpu":
        issues.add("fsdp.cpu_offload", "no-effect", "would be ignored: everything is on the CPU already.")


def uneven_batch(config: Config, number: int, what: str) -> str | None:
    """What is wrong with the batch size on so many processes or devices, if anything is."""
    if config.total_batch_size % (config.gradient_accumulation_steps * number) == 0:
        return None
    over = f" on each of {number} {what}" if number > 1 else ""
    return (
        f"{config.total_batch_size} examples cannot be cut into gradient_accumulation_steps="
        f"{config.gradient_accumulation_steps} equal micro-batches{over}."
    )
