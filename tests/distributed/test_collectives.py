"""How many collectives a step needs. Gathers and reductions of parameters are what many devices cost."""

import json
from pathlib import Path

from tests.distributed.launch import launch

L = 2  # blocks of the model
SMALL = 4  # sums of one number: whether to stop, the number of items, the loss, the norm


def kept(micro_batches: int) -> int:
    """Gathers of a step: embeddings and head once. Each block twice a micro-batch, but the last one once, and the first
    one stays from the backward pass to the next forward pass."""
    return 1 + micro_batches * (2 * L - 1) - (micro_batches - 1)


# options, shard -> parameters gathered, gradients scattered, gradients summed
CASES = {
    "full": ((), "full", (kept(1), L + 1, 0)),
    "accumulated": (("gradient_accumulation_steps=4",), "full", (kept(4), 4 * (L + 1), 0)),
    "recomputed": (("activation_checkpointing=true",), "full", (kept(1), L + 1, 0)),
    "packed": (("packing=true", "gradient_accumulation_steps=2"), "full", (kept(2), 2 * (L + 1), 0)),
    "lora": (("lora.rank=4", "gradient_accumulation_steps=2"), "full", (kept(2), 2 * L, 0)),
    "grad": (("gradient_accumulation_steps=4",), "grad", (L + 1, 4 * (L + 1), 0)),
    "none": (("gradient_accumulation_steps=4",), "none", (0, 0, L + 1)),
}


def test_the_collectives_of_a_step(job, scratch):
    """For each way to shard, with adapters, micro-batches and recomputation; every step needs the same."""
    jobs = {}
    for name, (options, shard, _) in CASES.items():
        made = job(name, *options, "n_steps=4", "log_every_steps=100", "save_every_steps=0", fsdp=shard)
        jobs[name] = {key: made[key] for key in ("config", "overrides")}
        jobs[name]["collectives"] = str(scratch.parent / f"{name}.collectives")
    launch(2, list(jobs.values()), scratch)
    for name, (_, _, (gathered, scattered, summed)) in CASES.items():
        lines = Path(jobs[name]["collectives"]).read_text().splitlines()
        steps = [json.loads(line) for line in lines[1:-1]]  # the first loads, too, and the last logs
        counts = {"_allgather_base_": gathered, "_reduce_scatter_base_": scattered, "allreduce_": SMALL + summed}
        assert len(steps) == 2
        for step in steps:
            assert step == {kind: count for kind, count in counts.items() if count}, name
