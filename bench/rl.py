"""GRPO on sampled answers against TRL's GRPOTrainer without vLLM: same model, prompts, reward and sizes, in one run.

    python bench/rl.py [--only ragged] [--rounds 3] [--peer-python P]

Each peer runs in a process of its own, in turns, in float32 on one thread. It samples a round of answers, judges them
and takes one optimizer step. Results are medians of all steps but the first. CPU seconds count what all processes of a
peer used; on a machine with other work they vary less than wall time. The table goes to bench/results. Exit status 1:
the peers did not do the same work.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from meter import Meter, median, pick_device, read_job  # noqa: E402
from workload import SPECIAL, Setting, build_model, build_tokenizer  # noqa: E402

PEERS = ("minitrain", "trl")
PARTS = ("generate", "judge", "train")
EOS = SPECIAL.index("<eos>")
BIAS = 1.0  # the first coordinate of all embeddings, through which the end token gets its probability


@dataclass
class Case:
    """Sizes of model and round.

    Attributes:
        goal: The smallest ratio that we aim at, and of what: step, generate or memory.
        end: Probability of the end token at each position; 0 makes all answers `new_tokens` long.
    """

    name: str
    goal: tuple[str, float]
    hidden: int
    layers: int
    vocab: int
    prompts: int
    new_tokens: int
    n: int = 8
    prompt_length: int = 12
    end: float = 0.0
    steps: int = 5

    @property
    def setting(self) -> Setting:
        intermediate = 8 * (self.hidden // 3)
        sizes = dict(hidden=self.hidden, intermediate=intermediate, layers=self.layers, max_length=1024)
        return Setting(self.vocab, "float32", self.steps, self.prompts, **sizes)


SMALL, MEDIUM = dict(hidden=64, layers=2, vocab=259), dict(hidden=384, layers=6, vocab=259)
CASES = [
    Case("0.1M parameters", ("step", 1.4), **SMALL, prompts=8, new_tokens=32, steps=20),
    Case("10.7M parameters", ("step", 1.1), **MEDIUM, prompts=8, new_tokens=32),
    Case("128,256 tokens", ("memory", 2.0), **(MEDIUM | {"vocab": 128_256}), prompts=8, new_tokens=32, steps=2),
    Case("ragged answers, 0.1M", ("generate", 4.0), **SMALL, prompts=64, new_tokens=128, end=1 / 30),
    Case("ragged answers, 10.7M", ("generate", 4.0), **MEDIUM, prompts=16, new_tokens=128, end=1 / 30, steps=3),
    Case("prompts of 512 tokens", ("step", 3.0), **MEDIUM, prompts=4, new_tokens=32, prompt_length=512, steps=2),
]


def main() -> int:
    from run import find_trl
    from workload import pick

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each peer runs (default 3)")
    parser.add_argument("--only", default="", help="only cases whose name has this in it, e.g. ragged")
    parser.add_argument("--peer-python", help="a Python that has TRL")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the table")
    arguments = parser.parse_args()
    cases = pick({case.name: case for case in CASES}, arguments.only)
    python, why_not = find_trl(arguments.peer_python)
    peers = [peer for peer in PEERS if python or peer != "trl"]
    results = []
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="minitrain-bench-") as folder:
            build(case, Path(folder))
            runs = {peer: [] for peer in peers}
            for number in range(arguments.rounds):
                for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:
                    runs[peer].append(run_peer(case, folder, peer, python))
        results.append((case, {peer: summary(each) for peer, each in runs.items()}))
        print("\n".join(section(*results[-1])), flush=True)
    return report(results, "" if python else why_not, arguments.results)


def build(case: Case, folder: Path) -> None:
    """Write the model and the prompts."""
    import numpy as np

    build_tokenizer(case.setting).save_pretrained(folder / "model")
    model = build_model(case.setting)
    set_end(model, case)
    model.save_pretrained(folder / "model")
    generator = np.random.Generator(np.random.PCG64(0))
    with open(folder / "prompts.jsonl", "w") as file:
        for _ in range(case.prompts * (case.steps + 2)):
            ids = generator.integers(len(SPECIAL), case.vocab, case.prompt_length)
            file.write(json.dumps({"prompt": " ".join(f"w{i}" for i in ids)}) + "\n")


@torch.no_grad()
def set_end(model: torch.nn.Module, case: Case) -> None:
    """Give the end token its probability at every position, and other special tokens none."""
    embeddings = model.get_input_embeddings().weight  # [V, H]
    embeddings[:, 0] = BIAS
    embeddings[[i for i in range(len(SPECIAL)) if i != EOS], 0] = -100 * BIAS
    for layer in model.model.layers:  # no layer changes the first coordinate
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    model.model.norm.weight[1:] = 0.2  # other logits are small
    shape = (16, 64) if case.vocab < 1000 else (2, 8)  # else the logits would take gigabytes
    ids = torch.randint(len(SPECIAL), case.vocab, shape, generator=torch.Generator().manual_seed(0))
    low, high = -100 * BIAS, 100 * BIAS
    for _ in range(40):
        embeddings[EOS, 0] = (low + high) / 2
        found = model(ids).logits.softmax(-1)[..., EOS].mean()
        low, high = (low, (low + high) / 2) if found > max(case.end, 1e-7) else ((low + high) / 2, high)


def run_peer(case: Case, folder: str, peer: str, python: str | None) -> dict:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        job = asdict(case) | {"folder": folder, "scratch": scratch, "out": f"{scratch}/result.json"}
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        command = [python if peer == "trl" else sys.executable, "-c", f"import rl; rl.peer_{peer}()"]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = f"{HERE}:{HERE.parent}"
        done = subprocess.run([*command, f"{scratch}/job.json"], env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{peer} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        result = json.loads(Path(job["out"]).read_text())
    print(f"{case.name}: {peer}: {summary([result])['cpu']:.3f} CPU s a step", flush=True)
    return result


def summary(runs: list[dict]) -> dict[str, float]:
    """Return the median of the timed steps of all runs, and the range of the runs."""
    steps = [step for run in runs for step in run["steps"][1:]]
    found = {name: median(step[name] for step in steps) for name in steps[0]}
    found["tokens"] = sum(step["tokens"] for step in steps) / len(steps)
    found["memory"] = median(run["peak_mib"] for run in runs)
    seconds = [median(step["cpu"] for step in run["steps"][1:]) for run in runs]
    return found | {"low": min(seconds), "high": max(seconds)}


def section(case: Case, peers: dict[str, dict]) -> list[str]:
    lines = [
        f"## {case.name}",
        "",
        f"{case.prompts} prompts of {case.prompt_length} tokens, {case.n} answers of up to {case.new_tokens} tokens; "
        f"hidden {case.hidden}, {case.layers} layers, vocabulary {case.vocab:,}; {case.steps} timed steps.",
        "",
        "| | CPU s a step | range | generate | judge | train | wall s | peak above the model, MiB | tokens an answer |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for peer, f in peers.items():
        times = " | ".join(f"{f[part]:.3f}" for part in PARTS)
        lines.append(
            f"| {peer} | {f['cpu']:.3f} | {f['low']:.3f} - {f['high']:.3f} | {times} | {f['wall']:.2f} | "
            f"{f['memory']:,.0f} | {f['tokens']:.1f} |"
        )
    if "trl" in peers:
        names = ("cpu", *PARTS, "wall", "memory")
        ratios = {name: peers["trl"][name] / max(1e-9, peers["minitrain"][name]) for name in names}
        listed = ", ".join(f"{name} {value:.2f}" for name, value in ratios.items())
        what, least = case.goal
        found = ratios["cpu" if what == "step" else what]
        lines += ["", f"TRL / minitrain: {listed}. Goal: {what} {least}; {'met' if found >= least else 'NOT MET'}."]
    return [*lines, ""]


def report(results: list[tuple[Case, dict]], why_not: str, folder: Path) -> int:
    from report import hardware

    lengths = [[f["tokens"] for f in peers.values()] for _, peers in results]
    same = all(math.isclose(length, each[0], rel_tol=0.1) for each in lengths for length in each)
    lines = [f"# GRPO on sampled answers, {hardware()}, {datetime.date.today()}", ""]
    lines += [f"torch {torch.__version__}, TRL {why_not or '1.16 without vLLM'}; float32, one thread.", ""]
    lines += [line for case, peers in results for line in section(case, peers)]
    lines += ["All peers did the same work." if same else "THE PEERS DID NOT DO THE SAME WORK.", ""]
    name = f"{datetime.date.today()}-{re.sub(r'[^a-z0-9]+', '-', hardware().lower()).strip('-')}-rl.md"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines))
    print(f"{lines[-2]} Written to {folder / name}.")
    return 0 if same else 1


# --------------------------------------------------------------------------------------------------------- the peers


class Clock:
    """Measures each step and its parts."""

    def __init__(self):
        self.meter, self.steps, self.parts = Meter(pick_device()), [], Counter()

    def begin(self, model: torch.nn.Module) -> None:
        self.meter.begin(model)
        self.cpu, self.wall = cpu_seconds(), time.perf_counter()

    def wrap(self, name: str, owner: object, attribute: str) -> None:
        """Count the CPU seconds of a method of an object."""
        function = getattr(owner, attribute)

        def timed(*args, **kwargs):
            began = cpu_seconds()
            result = function(*args, **kwargs)
            self.parts[name] += cpu_seconds() - began
            return result

        setattr(owner, attribute, timed)

    def tick(self, tokens: float) -> None:
        """End a step, in which answers had `tokens` tokens on average."""
        cpu, wall = cpu_seconds(), time.perf_counter()
        step = {"cpu": cpu - self.cpu, "wall": wall - self.wall, "tokens": tokens}
        step |= {name: self.parts[name] for name in ("generate", "judge")}
        self.steps.append(step | {"train": step["cpu"] - step["generate"] - step["judge"]})
        self.parts.clear()
        self.cpu, self.wall = cpu_seconds(), time.perf_counter()

    def write(self, job: dict) -> None:
        Path(job["out"]).write_text(json.dumps({"steps": self.steps, "peak_mib": self.meter.peak_mib()}))


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and its children."""
    own, ticks = time.process_time(), 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return own + ticks / os.sysconf("SC_CLK_TCK")


def reward_of(text: str) -> float:
    """Return the fraction of even words."""
    words = text.split()
    return sum(word[1:].isdigit() and int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def peer_minitrain() -> None:
    from minitrain import Trainer, load_config
    from minitrain.rl.rewards import register_reward

    torch.set_num_threads(1)
    job, clock = read_job(), Clock()
    register_reward("even")(lambda answer, options: reward_of(answer.text))
    config = {
        "exp_name": "bench",
        "output_dir": job["scratch"],
        "cache_dir": f"{job['scratch']}/cache",
        "datasets": [f"{job['folder']}/prompts.jsonl"],
        "chat_template": "none",
        "model": {"name_or_path": f"{job['folder']}/model"},
        "loss": {"name": "policy"},
        "rollout": {
            "num_generations": job["n"],
            "prompts_per_round": job["prompts"],
            "max_new_tokens": job["new_tokens"],
            "rewards": ["even"],
        },
        "max_length": job["prompt_length"] + job["new_tokens"],
        "packing": True,
        "total_batch_size": job["prompts"],
        "n_steps": job["steps"] + 1,
        "lr": 1e-5,
        "lr_scheduler": "constant",
        "num_proc": 1,
        "log_every_steps": 1,
    }

    def begin(trainer: Trainer) -> None:
        clock.wrap("generate", trainer.train_loader, "play")
        clock.wrap("judge", trainer.train_loader, "judge")
        clock.begin(trainer.policy)

    def step(trainer: Trainer) -> None:
        cache = trainer.train_loader.examples.caches[0]
        clock.tick(float(cache.mask.sum()) / (len(cache.offsets) - 1))
        if trainer.step == job["steps"] + 1:
            clock.write(job)

    Trainer(load_config(config), on_train_begin=begin, on_step_end=step).train()


def peer_trl() -> None:
    import trl
    from datasets import Dataset
    from peer_trl import arguments
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(1)
    job, clock, lengths = read_job(), Clock(), []

    def even(completions: list[str], completion_ids: list[list[int]], **kwargs) -> list[float]:
        lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
        return [reward_of(text) for text in completions]

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            clock.begin(model)

        def on_step_end(self, args, state, control, **kwargs):
            clock.tick(lengths[-1])

    rows = [json.loads(line) for line in (Path(job["folder"]) / "prompts.jsonl").read_text().splitlines()]
    sizes = {"batch": job["prompts"] * job["n"], "lr": 1e-5, "dtype": "float32", "n_steps": job["steps"] + 1}
    options = arguments(sizes | {"scratch": job["scratch"]})
    del options["train_sampling_strategy"]
    config = trl.GRPOConfig(
        **options,
        num_generations=job["n"],
        max_completion_length=job["new_tokens"],
        steps_per_generation=1,
        shuffle_dataset=False,
        beta=0.0,
        top_k=0,
    )
    folder = f"{job['folder']}/model"
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=even,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Watch()],
    )
    clock.wrap("generate", trainer, "_generate")
    clock.wrap("judge", trainer, "_calculate_rewards")
    trainer.train()
    clock.write(job)


if __name__ == "__main__":
    sys.exit(main())
