"""DPO against a loop written by hand and against TRL's DPOTrainer: same model, pairs, order and dtype, in one run.

    python bench/dpo.py [--rounds 3] [--quick] [--peer-python P]

Each peer runs in a process of its own, in turns. All compute a reference at each step, but for `precomputed`, which
noted its log-probabilities before; `packed` computes a prompt once for both answers, `unshared` packs without that.
The figures go to bench/results. Exit status 1: the peers did not do the same work.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from meter import Meter, median, pick_device, read_job, write_result  # noqa: E402

PEERS = ("minitrain packed", "minitrain unshared", "minitrain precomputed", "minitrain padded", "hand", "trl")
BETA, EOS = 0.1, 1


def main() -> int:
    from report import hardware
    from run import find_trl
    from workload import Setting, build_model, build_tokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the small vocabulary only, few steps, one round")
    parser.add_argument("--peer-python", help="a Python that has TRL")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    python, why_not = find_trl(arguments.peer_python)
    peers = [peer for peer in PEERS if python or peer != "trl"]
    settings = [Setting(8_192, "float32", steps=6, batch=8), Setting(128_256, "float32", steps=3, batch=8)]
    if arguments.quick:
        settings = [replace(settings[0], steps=3, warmup=1)]
    lines = [f"# DPO, {hardware()}, {datetime.date.today()}", "", f"TRL {'as installed' if python else why_not}.", ""]
    good = True
    for setting in settings:
        with tempfile.TemporaryDirectory(prefix="minitrain-bench-") as scratch:
            build_tokenizer(setting).save_pretrained(f"{scratch}/model")
            build_model(setting).save_pretrained(f"{scratch}/model")
            write_pairs(setting, Path(scratch))
            runs = {peer: [] for peer in peers}
            for number in range(1 if arguments.quick else arguments.rounds):
                for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:
                    runs[peer].append(run_peer(setting, scratch, peer, python))
                    print(
                        f"{setting.name}: {peer}: {sum(runs[peer][-1]['seconds'][setting.warmup :]):.1f} s", flush=True
                    )
        lines += table(setting, runs)
        good &= same_work(runs)
    lines += ["All peers did the same work." if good else "THE PEERS DID NOT DO THE SAME WORK.", ""]
    name = f"{datetime.date.today()}-{re.sub(r'[^a-z0-9]+', '-', hardware().lower()).strip('-')}-dpo.md"
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / name).write_text("\n".join(lines))
    print("\n".join(lines))
    return 0 if good else 1


def write_pairs(setting, folder: Path) -> None:
    """pairs.json (ids, in minitrain's order) and pairs.jsonl (the same as texts): prompts of some 100 tokens, answers
    of half of that."""
    import numpy as np

    from minitrain.data.sampler import epoch_order

    generator = np.random.Generator(np.random.PCG64(0))

    def draw(median_length: int) -> list[int]:
        length = int(np.clip(generator.lognormal(np.log(median_length), 0.5), 8, 300))
        return (generator.integers(3, setting.vocab, length)).tolist()

    rows = [{"prompt": draw(100), "chosen": draw(50), "rejected": draw(50)} for _ in range(setting.n_examples)]
    with open(folder / "pairs.jsonl", "w") as file:
        for row in rows:
            texts = {key: " ".join(f"w{i}" for i in ids) for key, ids in row.items()}
            file.write(json.dumps(texts | {"prompt": texts["prompt"] + " "}) + "\n")
    ordered = [rows[i] for i in epoch_order([len(rows)], [1.0], 0, 0)]
    (folder / "pairs.json").write_text(json.dumps(ordered))


def run_peer(setting, folder: str, peer: str, python: str | None) -> dict:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        job = asdict(setting) | {"kind": peer, "folder": folder, "scratch": scratch, "out": f"{scratch}/result.json"}
        job["n_steps"] = setting.warmup + setting.steps
        (Path(scratch) / "job.json").write_text(json.dumps(job))
        code = f"import sys; sys.path[:0] = [{str(HERE)!r}]; import dpo; dpo.peer_{peer.partition(' ')[0]}()"
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [python if peer == "trl" else sys.executable, "-c", code, f"{scratch}/job.json"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{peer} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        return json.loads(Path(job["out"]).read_text())


def table(setting, runs: dict[str, list[dict]]) -> list[str]:
    lines = [f"## {setting.name}, {setting.batch} pairs a step", ""]
    lines += ["| | pairs/s | range | vs hand | vs TRL | vs hand, CPU seconds | peak above the model, MiB |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    rates, cpu = {}, {}
    for peer, found in runs.items():
        each = [setting.batch * setting.steps / sum(run["seconds"][setting.warmup :]) for run in found]
        rates[peer] = median(each), min(each), max(each)
        cpu[peer] = median(sum(run["cpu_seconds"][setting.warmup :]) for run in found)
    for peer, (rate, low, high) in rates.items():
        ratios = [f"{rate / rates[other][0]:.2f}" if other in rates else "-" for other in ("hand", "trl")]
        peak = median(run["peak_mib"] for run in runs[peer])
        ratios.append(f"{cpu['hand'] / cpu[peer]:.2f}" if "hand" in cpu else "-")
        lines.append(f"| {peer} | {rate:.2f} | {low:.2f} - {high:.2f} | {' | '.join(ratios)} | {peak:,.0f} |")
    losses = {peer: [round(loss, 4) for loss in found[0]["losses"][:4]] for peer, found in runs.items()}
    return [*lines, "", "Losses of the first steps:", "", *[f"- {peer}: {found}" for peer, found in losses.items()], ""]


def same_work(runs: dict[str, list[dict]]) -> bool:
    wanted = runs["hand"][0]["losses"]
    return all(
        abs(a - b) <= 2e-3 * abs(b) for found in runs.values() for a, b in zip(found[0]["losses"], wanted, strict=False)
    )


# --------------------------------------------------------------------------------------------------------- the peers


def peer_minitrain() -> None:
    from peer_minitrain import train

    def prepare(trainer) -> None:
        if job["kind"].endswith("unshared"):
            trainer.train_loader.shares_prompts = False

    job = read_job()
    reference = "precomputed" if job["kind"].endswith("precomputed") else "model"
    loss = ("loss.name=dpo", f"loss.beta={BETA}", f"loss.reference={reference}")
    packing = f"packing={not job['kind'].endswith('padded')}"
    train(job, "pairs.jsonl", packing, "max_length=1024", *loss, prepare=prepare)


def peer_hand() -> None:
    """Chosen and rejected padded side by side, the log-softmax of all logits, policy and frozen reference."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM

    job, device = read_job(), pick_device()
    rows = json.loads((Path(job["folder"]) / "pairs.json").read_text())
    folder = f"{job['folder']}/model"
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device) for _ in range(2))
    model.train()
    reference.requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["lr"], weight_decay=0.0, fused=True)

    def sums(net, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1]
        logps = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
        return (logps * mask[:, 1:]).sum(1)

    losses, pairs, places = [], [], []
    meter = Meter(device)
    meter.begin(model)
    for start in range(0, job["n_steps"] * job["batch"], job["batch"]):
        part = rows[start : start + job["batch"]]
        texts = [(row["prompt"], row[side] + [EOS]) for side in ("chosen", "rejected") for row in part]
        ids = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in texts], batch_first=True)
        mask = pad_sequence([torch.tensor([0.0] * len(p) + [1.0] * len(a)) for p, a in texts], batch_first=True)
        ids, mask = ids.to(device), mask.to(device)
        with torch.no_grad():
            ref = sums(reference, ids, mask)
        chosen, rejected = (sums(model, ids, mask) - ref).chunk(2)
        loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        pairs.append(len(part))
        places.append(ids.numel())
        meter.tick()
    write_result(job, meter, losses, pairs, places)


def peer_trl() -> None:
    import trl
    from datasets import Dataset
    from peer_trl import Watch, arguments
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job, losses = read_job(), []

    class Watched(trl.DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    rows = json.loads((Path(job["folder"]) / "pairs.json").read_text())
    texts = [{key: " ".join(f"w{i}" for i in ids) for key, ids in row.items()} for row in rows]
    texts = [row | {"prompt": row["prompt"] + " "} for row in texts]
    config = trl.DPOConfig(**arguments(job), beta=BETA, max_length=1024)
    meter = Meter(pick_device())
    folder = f"{job['folder']}/model"
    trainer = Watched(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[Watch(meter)],
    )
    trainer.train()
    write_result(job, meter, losses, [job["batch"]] * len(losses), [0] * len(losses))


if __name__ == "__main__":
    sys.exit(main())
