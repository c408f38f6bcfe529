"""The memory that `minitrain validate` expects of a training against what the training takes.

    python bench/memory.py [--only packed] [--results FOLDER]

Each setting has a process of its own, which trains for an epoch of two steps, then estimates. Measured is the most that
the process held, above what it held with all libraries loaded and before it read data or model. On two ranks it is the
larger one's. The table goes to bench/results.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from dpo import write_pairs  # noqa: E402
from meter import Meter, pick_device  # noqa: E402
from report import hardware  # noqa: E402
from workload import Setting, build, pick  # noqa: E402

SMALL = Setting(vocab=8192, dtype="float32", steps=2, warmup=0, batch=8, hidden=512, intermediate=1408, layers=4)
LARGE = replace(SMALL, vocab=128_256, hidden=256, intermediate=704, layers=2)
EXPERTS = replace(SMALL, hidden=256, intermediate=512, experts=8)
BF16, PACKED, LORA = "model.policy_dtype=bfloat16", "packing=true", "lora.rank=16"
DPO, ACCUMULATE = "loss.name=dpo", "gradient_accumulation_steps=4"
SHARDED, RANKS = "trainer=FSDPTrainer", 2
SETTINGS = [  # model, overrides
    (SMALL, []),
    (SMALL, [PACKED]),
    (SMALL, [PACKED, ACCUMULATE]),
    (SMALL, ["activation_checkpointing=true"]),
    (SMALL, ["activation_checkpointing=true", "optimizer=SGD"]),
    (SMALL, ["freeze_layers=[0-1,embeddings]"]),
    (SMALL, [BF16]),
    (SMALL, [BF16, "model.master_dtype=bfloat16"]),
    (SMALL, [LORA]),
    (SMALL, [LORA, BF16, PACKED]),
    (SMALL, [LORA, "model.quantization=4bit"]),
    (SMALL, [DPO]),
    (SMALL, [DPO, LORA, PACKED]),
    (SMALL, [SHARDED]),
    (LARGE, []),
    (LARGE, [PACKED, "activation_checkpointing=true"]),
    (LARGE, [BF16]),
    (LARGE, [LORA, PACKED]),
    (LARGE, [DPO, PACKED]),
    (LARGE, [SHARDED, "fsdp.shard=grad"]),
    (EXPERTS, []),
    (EXPERTS, [PACKED, BF16]),
    (EXPERTS, [BF16, "model.master_dtype=bfloat16"]),
    (EXPERTS, [LORA, PACKED]),
]
NOTE = """\
A Llama with random weights and tied embeddings: 512 wide, 4 layers, 8,192 tokens; or 256 wide, 2 layers, 128,256
tokens; or a Mixtral, 256 wide, 4 layers of 8 experts.
AdamW and sft but where another is named; 8 examples a step of up to 512 tokens, for two steps. `estimated`
is what `minitrain validate` reports. `measured` is the peak of the resident memory of the process above what it was
with all libraries loaded, so it has data, loading and all that libraries allocate in it. FSDPTrainer is on two ranks,
of which the larger peak is reported. Nothing was adjusted to these numbers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only settings with this in their options, e.g. packing=true")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the table")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, scratch, *overrides = arguments.worker
        work(Path(folder), Path(scratch), overrides)
        return
    named = {f"{model.vocab:,} tokens, {', '.join(overrides)}": (model, overrides) for model, overrides in SETTINGS}
    settings = pick(named, arguments.only)
    lines = [f"# Estimated and measured memory, {hardware()}, {datetime.date.today()}", "", NOTE, ""]
    lines += [f"torch {torch.__version__}.", ""]
    lines += ["| tokens | options | estimated, MiB | measured, MiB | error | apart, MiB |"]
    lines += ["|---:|---|---:|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {id(model): Path(scratch) / f"{model.vocab}-{model.experts}" for model in (SMALL, LARGE, EXPERTS)}
        for model in (SMALL, LARGE, EXPERTS):
            build(model, folders[id(model)])
            write_pairs(model, folders[id(model)])
        for model, overrides in settings:
            lines.append(row(model, overrides, folders[id(model)]))
            print(lines[-1], flush=True)
    name = f"{datetime.date.today()}-{re.sub(r'[^a-z0-9]+', '-', hardware().lower()).strip('-')}-memory.md"
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / name).write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:5]), f"\nwritten to {arguments.results / name}", sep="")


def row(model: Setting, overrides: list[str], folder: Path) -> str:
    """Trains and estimates -> a line of the table."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    # Else the C library keeps freed blocks of up to 32 MiB for itself, and the peak tells of that instead.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        launcher = torchrun if SHARDED in overrides else [sys.executable]
        command = [*launcher, __file__, "--worker", str(folder), scratch, *overrides]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-1000:] + done.stderr[-3000:])
        results = [json.loads(file.read_text()) for file in Path(scratch).glob("*.json")]
    measured, estimated = max(one["measured"] for one in results), results[0]["estimated"]
    figures = f"{estimated:,.0f} | {measured:,.0f} | {estimated / measured - 1:+.0%} | {estimated - measured:+,.0f}"
    experts = f" ({model.experts} experts)" if model.experts else ""
    return f"| {model.vocab:,}{experts} | {', '.join(overrides)} | {figures} |"


def work(folder: Path, scratch: Path, overrides: list[str]) -> None:
    """Trains with the meter on, then estimates."""
    from minitrain import Trainer
    from minitrain.tools.preflight.memory import estimate_memory
    from minitrain.training.setup import dry_run

    if "model.quantization=4bit" in overrides:
        import bitsandbytes  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    config, meter = config_of(folder, scratch, overrides), Meter(pick_device())
    meter.begin()
    trainer = Trainer(config)
    trainer.train()
    result, rank = {"measured": meter.peak_mib()}, trainer.parallel.rank
    trainer.parallel.close()
    result["estimated"] = (
        estimate_memory(dry_run(config), pick_device(), RANKS if SHARDED in overrides else 1).peak / 2**20
    )
    (scratch / f"{rank}.json").write_text(json.dumps(result))


def config_of(folder: Path, scratch: Path, overrides: list[str]):
    from minitrain import load_config

    data = "pairs.jsonl" if DPO in overrides else "data.jsonl"
    config = {
        "exp_name": "run",
        "output_dir": str(scratch),
        "cache_dir": str(folder / "cache"),
        "datasets": [str(folder / data)],
        "model": {"name_or_path": str(folder / "model")},
        "chat_template": "none",
        "max_length": SMALL.max_length,
        "total_batch_size": SMALL.batch,
        "n_steps": SMALL.steps,
        "num_proc": 1,
    }
    return load_config(config, overrides)


if __name__ == "__main__":
    main()
