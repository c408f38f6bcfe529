"""The memory that `minitrain validate` expects of a training against what the training takes.

    python bench/memory.py [--only packed] [--results FOLDER]

Each setting is estimated in one process and trained in another, for one epoch of three steps. Measured is the most that
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
from workload import Setting, build  # noqa: E402

SMALL = Setting(vocab=8192, dtype="float32", steps=3, warmup=0, batch=8, hidden=512, intermediate=1408, layers=8)
LARGE = replace(SMALL, vocab=128_256, hidden=256, intermediate=704, layers=4)
BF16, PACKED, LORA = "model.policy_dtype=bfloat16", "packing=true", "lora.rank=16"
DPO, ACCUMULATE = "loss.name=dpo", "gradient_accumulation_steps=4"
SHARDED = "trainer=FSDPTrainer"
SETTINGS = [  # model, overrides
    (SMALL, []),
    (SMALL, [PACKED]),
    (SMALL, [PACKED, ACCUMULATE]),
    (SMALL, ["activation_checkpointing=true"]),
    (SMALL, ["activation_checkpointing=true", "optimizer=SGD"]),
    (SMALL, ["freeze_layers=[0-5,embeddings]"]),
    (SMALL, [BF16]),
    (SMALL, [BF16, "model.master_dtype=bfloat16"]),
    (SMALL, [LORA]),
    (SMALL, [LORA, BF16, PACKED]),
    (SMALL, [LORA, "model.quantization=4bit"]),
    (SMALL, [DPO]),
    (SMALL, [DPO, LORA, PACKED]),
    (SMALL, [SHARDED]),
    (SMALL, [SHARDED, "activation_checkpointing=true"]),
    (LARGE, []),
    (LARGE, [PACKED, "activation_checkpointing=true"]),
    (LARGE, [BF16]),
    (LARGE, [LORA, PACKED]),
    (LARGE, [DPO, PACKED]),
    (LARGE, [SHARDED, "fsdp.shard=grad"]),
]
NOTE = """\
A Llama with random weights and tied embeddings: 512 wide, 8 layers, 8,192 tokens; or 256 wide, 4 layers, 128,256
tokens. AdamW and sft but where another is named; 8 examples a step of up to 512 tokens, for three steps. `estimated`
is what `minitrain validate` tells. `measured` is the peak of the resident memory of the process above what it was with
all libraries loaded, so it has data, loading and all that libraries allocate in it. FSDPTrainer is on two ranks, of
which the larger one's is told. Nothing was adjusted to these figures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only settings with this in their options")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the table")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, folder, *overrides = arguments.worker
        {"estimate": estimate, "train": train}[kind](Path(folder), overrides)
        return
    lines = [f"# Estimated and measured memory, {hardware()}, {datetime.date.today()}", "", NOTE, ""]
    lines += [f"torch {torch.__version__}.", ""]
    lines += ["| tokens | options | estimated, MiB | measured, MiB | error |", "|---:|---|---:|---:|---:|"]
    with tempfile.TemporaryDirectory() as scratch:
        folders = {id(model): Path(scratch) / str(model.vocab) for model in (SMALL, LARGE)}
        for model in (SMALL, LARGE):
            build(model, folders[id(model)])
            write_pairs(model, folders[id(model)])
        for model, overrides in SETTINGS:
            if arguments.only in " ".join(overrides):
                lines.append(row(model, overrides, folders[id(model)]))
                print(lines[-1], flush=True)
    name = f"{datetime.date.today()}-{re.sub(r'[^a-z0-9]+', '-', hardware().lower()).strip('-')}-memory.md"
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / name).write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:5]), f"\nwritten to {arguments.results / name}", sep="")


def row(model: Setting, overrides: list[str], folder: Path) -> str:
    """Estimates and trains -> a line of the table."""
    ranks = 2 if SHARDED in overrides else 1
    expected = run([sys.executable], "estimate", folder, overrides)[0]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    found = max(run(torchrun if ranks > 1 else [sys.executable], "train", folder, overrides))
    cells = (
        f"{model.vocab:,}",
        ", ".join(overrides),
        f"{expected:,.0f}",
        f"{found:,.0f}",
        f"{expected / found - 1:+.0%}",
    )
    return f"| {' | '.join(cells)} |"


def run(launcher: list[str], kind: str, folder: Path, overrides: list[str]) -> list[float]:
    """MiB that each process tells."""
    # Else the C library keeps freed blocks of up to 32 MiB for itself, and the peak tells of that instead.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        env["OUT"] = scratch
        command = [*launcher, __file__, "--worker", kind, str(folder), *overrides]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stdout[-1000:] + done.stderr[-3000:])
        return [json.loads(file.read_text()) for file in Path(scratch).glob("*.json")]


def config_of(folder: Path, overrides: list[str]):
    from minitrain import load_config

    data = "pairs.jsonl" if DPO in overrides else "data.jsonl"
    config = {
        "exp_name": f"run-{os.environ['OUT'].rpartition('/')[2]}",
        "output_dir": str(folder / "runs"),
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


def estimate(folder: Path, overrides: list[str]) -> None:
    from minitrain.dry import dry_run
    from minitrain.memory import estimate

    ranks = 2 if SHARDED in overrides else 1
    tell(estimate(dry_run(config_of(folder, overrides)), pick_device(), ranks).peak / 2**20)


def train(folder: Path, overrides: list[str]) -> None:
    from minitrain import Trainer

    if "model.quantization=4bit" in overrides:
        import bitsandbytes  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    config, meter = config_of(folder, overrides), Meter(pick_device())
    meter.begin()
    trainer = Trainer(config)
    trainer.train()
    tell(meter.peak_mib())
    trainer.parallel.close()


def tell(mib: float) -> None:
    (Path(os.environ["OUT"]) / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(mib))


if __name__ == "__main__":
    main()
