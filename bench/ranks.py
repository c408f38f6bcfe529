"""Memory of each rank: the same training of a model of about 100 million parameters on 1 and on 2 ranks.

    python bench/ranks.py [--ranks 1 2] [--shard full]

`peak` is what a process takes above what it held before the model was built; `state` counts the bytes of this
rank's parameters, gradients and moments.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from meter import Meter, pick_device  # noqa: E402
from workload import Setting, build  # noqa: E402

SETTING = Setting(
    vocab=8192, dtype="float32", steps=3, batch=8, hidden=768, intermediate=2048, layers=12, max_length=64
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shard", default="full", choices=("full", "grad", "none"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.shard)
        return
    with tempfile.TemporaryDirectory() as folder:
        build(SETTING, Path(folder) / "work")
        print("| ranks | rank | parameters, M | state, MiB | peak, MiB | first loss |\n|---:|---:|---:|---:|---:|---:|")
        for ranks in arguments.ranks:
            launch(ranks, Path(folder), arguments.shard)


def launch(ranks: int, folder: Path, shard: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*torchrun, __file__, "--worker", folder, "--shard", shard]
    # Else the C library keeps freed blocks of up to 32 MiB for itself, and the peak tells of that instead.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    for file in sorted(folder.glob(f"{ranks}-*.json")):
        result = json.loads(file.read_text())
        cells = (
            ranks,
            result["rank"],
            f"{result['parameters'] / 1e6:.0f}",
            f"{result['state']:,.0f}",
            f"{result['peak']:,.0f}",
        )
        print("|", " | ".join(map(str, cells)), "|", f"{result['loss']:.6f}", "|", flush=True)


def work(folder: Path, shard: str) -> None:
    """One rank: trains, and writes what it took."""
    from minitrain import Trainer, load_config
    from minitrain.distributed.parallel import local_shard

    state, losses = [], []

    def note(trainer: Trainer) -> None:
        tensors = [t for p in trainer.parameters for t in (p, *trainer.optimizer.state[p].values())]
        held = sum(local_shard(tensor)[0].nbytes for tensor in tensors)
        state.append((held + sum(local_shard(p)[0].nbytes for p in trainer.parameters)) / 2**20)  # gradients: like p
        losses.append(trainer.train_metrics["loss"])

    meter = Meter(pick_device())
    meter.begin()
    config = {
        "datasets": [str(folder / "work" / "data.jsonl")],
        "model": {"name_or_path": str(folder / "work" / "model")},
        "output_dir": str(folder / "runs"),
        "cache_dir": str(folder / "cache"),
        "trainer": "FSDPTrainer",
        "fsdp": {"shard": shard},
        "chat_template": "none",
        "total_batch_size": SETTING.batch,
        "max_length": SETTING.max_length,
        "n_steps": SETTING.steps,
        "log_every_steps": 1,
        "num_proc": 1,
    }
    world_size = int(os.environ["WORLD_SIZE"])
    trainer = Trainer(load_config(config | {"exp_name": f"ranks-{world_size}"}), on_step_end=note)
    trainer.train()
    rank = trainer.parallel.rank
    result = {"rank": rank, "state": state[-1], "peak": meter.peak_mib(), "loss": losses[0]}
    result["parameters"] = sum(p.numel() for p in trainer.policy.parameters())
    (folder / f"{world_size}-{rank}.json").write_text(json.dumps(result))
    trainer.parallel.close()


if __name__ == "__main__":
    main()
