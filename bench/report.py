"""What was measured, checked for being the same work, as a table in markdown and as JSON."""

import datetime
import json
import os
import platform
import re
from pathlib import Path

import torch
from meter import median
from workload import Setting, flops

TOLERANCE = {"float32": 2e-4, "bfloat16": 2e-2}  # of the loss, relative
NOTE = """\
Each peer trains the same model on the same examples in the same order, in a process of its own, the peers taking
turns. tokens/s counts tokens that are not padding: the sum over the timed steps, each step at its median over the
rounds, warm-up steps left out; `range` is the slowest and the fastest round. `vs hand, CPU` compares tokens per CPU
second of all threads, which other work on the machine disturbs less. Peak memory is what the process took
above the loaded model while it trained (gradients and optimizer included). Share of matmul: the time that the
products a step cannot do without (6 x weights x tokens, the output layer on supervised tokens only) would take at
the rate measured in the same process for such products, over the time a step took; padding, attention and all else
is what is missing from 100%. On a CPU that rate is the better one of the dtype and float32. TRL has a chunked head of
its own; without Triton, so on a CPU, it runs that over the positions that are not learned too."""


def report(results: list[dict], skipped: dict[str, str], folder: Path, seconds: float) -> int:
    """Writes the files, prints the table; 1 when peers did not do the same work."""
    summaries = [summarise(result) for result in results]
    lines = header(results, skipped, seconds)
    for summary in summaries:
        lines += section(summary)
    verdicts, same_work = judge(summaries, skipped)
    lines += ["## Verdicts", "", *[f"- {line}" for line in verdicts], ""]
    folder.mkdir(parents=True, exist_ok=True)
    kind = "-lora" if results[0]["setting"]["lora"] else ""
    name = f"{datetime.date.today()}-{re.sub(r'[^a-z0-9]+', '-', hardware().lower()).strip('-')}{kind}"
    (folder / f"{name}.md").write_text("\n".join(lines))
    (folder / f"{name}.json").write_text(json.dumps({"hardware": hardware(), "settings": summaries}, indent=1) + "\n")
    print("\n".join(lines), f"\nwritten to {folder / name}.md and .json", sep="")
    return 0 if same_work else 1


def summarise(result: dict) -> dict:
    """The figures of one setting."""
    setting = Setting(**result["setting"])
    sizes = result["sizes"]
    summary = {
        "name": setting.name,
        "setting": result["setting"],
        "supervised": [size["supervised"] for size in sizes],
        "peers": {peer: figures(setting, sizes, runs) for peer, runs in result["runs"].items() if peer != "breakdown"},
        "breakdown": result["runs"].get("breakdown", [{}])[0].get("breakdown"),
    }
    work = [flops(setting, size) for size in sizes[setting.warmup :]]
    summary["attention_share"] = sum(w["attention"] for w in work) / sum(w["body"] for w in work)
    return summary


def figures(setting: Setting, sizes: list[dict], runs: list[dict]) -> dict:
    """One peer in one setting, over its rounds."""
    timed = slice(setting.warmup, None)
    tokens = sum(size["tokens"] for size in sizes[timed])
    seconds = sum(median(times) for times in zip(*[run["seconds"][timed] for run in runs]))
    per_round = sorted(tokens / sum(run["seconds"][timed]) for run in runs)
    rates = {part: median(run["rates"][part] for run in runs) for part in ("body", "head")}
    ideal = sum(flops(setting, size)[part] / rates[part] for size in sizes[timed] for part in rates)
    first = runs[0]
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / sum(median(t) for t in zip(*[run["cpu_seconds"][timed] for run in runs])),
        "range": [per_round[0], per_round[-1]],
        "peak_mib": median(run["peak_mib"] for run in runs),
        "matmul_share": ideal / seconds,
        "gflops": {part: rate / 1e9 for part, rate in rates.items()},
        "padding": 1 - tokens / sum(first["places"][timed]),
        "losses": first["losses"],
        "supervised": first["supervised"],
        "rounds": len(runs),
        "versions": {key: first[key] for key in ("torch", "transformers", "trl") if key in first},
    }


def section(summary: dict) -> list[str]:
    """Markdown of one setting."""
    peers, setting = summary["peers"], Setting(**summary["setting"])
    lines = [
        f"## Vocabulary of {summary['name']}",
        "",
        f"{setting.batch} examples a step, {setting.warmup} + {setting.steps} steps, hidden {setting.hidden}, "
        f"{setting.layers} layers; attention adds {summary['attention_share']:.0%} to the products of the body.",
        "",
        "| | tokens/s | range | vs hand | vs TRL | vs hand, CPU | peak above model, MiB | share of matmul | padding |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for peer, f in peers.items():
        low, high = f["range"]
        ratios = " | ".join(ratio(f, peers.get(other)) for other in ("hand", "trl"))
        ratios += " | " + ratio(f, peers.get("hand"), "tokens_per_cpu_second")
        lines.append(
            f"| {peer} | {f['tokens_per_second']:,.0f} | {low:,.0f} - {high:,.0f} | {ratios} | {f['peak_mib']:,.0f} | "
            f"{f['matmul_share']:.0%} | {f['padding']:.0%} |"
        )
    rates = ", ".join(f"{part} {rate:,.0f}" for part, rate in next(iter(peers.values()))["gflops"].items())
    lines += ["", f"Rate of products alone, GFLOP/s: {rates}.", ""]
    lines += ["Supervised tokens and loss of the first steps:", ""]
    for peer, f in peers.items():
        steps = "; ".join(f"{n} {loss:.5f}" for n, loss in list(zip(f["supervised"], f["losses"]))[:4])
        lines.append(f"- {peer}: {steps}")
    if summary["breakdown"]:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in summary["breakdown"].items())
        lines += ["", f"Where minitrain's time goes (padded): {parts}."]
    return [*lines, ""]


def ratio(figures: dict, other: dict | None, speed: str = "tokens_per_second") -> str:
    return f"{figures[speed] / other[speed]:.2f}" if other else "-"


def judge(summaries: list[dict], skipped: dict[str, str]) -> tuple[list[str], bool]:
    """(a line for each aim, whether all peers did the same work)."""
    lines = [f"{peer}: skipped ({why}); nothing is claimed against it" for peer, why in skipped.items()]
    same_work = True
    for summary in summaries:
        peers, name = summary["peers"], summary["name"]
        differing = [peer for peer, f in peers.items() if not does_same_work(f, summary)]
        same_work &= not differing
        found = f"NOT THE SAME WORK: {', '.join(differing)}" if differing else "same work in all"
        lines.append(f"{name}: {found if 'hand' in peers else 'losses not compared, hand was left out'}")
        rate = {peer: f["tokens_per_second"] for peer, f in peers.items()}
        memory = {peer: f["peak_mib"] for peer, f in peers.items()}
        aims = [("minitrain", "hand"), ("minitrain", "trl"), ("minitrain packed", "minitrain")]
        for a, b in aims:
            if a in peers and b in peers:
                lines.append(f"{name}: {a} against {b}: {compared(peers[a], peers[b])} ({rate[a] / rate[b]:.2f})")
        for other in ("full_logits", "trl"):
            if setting_is_large(summary) and "minitrain" in peers and other in peers:
                share = memory["minitrain"] / memory[other]
                lines.append(f"{name}: half of the memory of {other}: {verdict(share <= 0.5)} ({share:.2f})")
    return lines, same_work


def does_same_work(f: dict, summary: dict) -> bool:
    """As many supervised tokens in each step as the data says, the loss of the hand-written loop, and its padding.

    Only a packed peer has none.
    """
    hand, packed = summary["peers"].get("hand", f), f is summary["peers"].get("minitrain packed")
    tolerance = TOLERANCE[summary["setting"]["dtype"]]
    near = all(abs(a - b) <= tolerance * abs(b) for a, b in zip(f["losses"], hand["losses"]))
    as_laid_out = abs(f["padding"] - (0 if packed else hand["padding"])) < 0.02
    return near and as_laid_out and f["supervised"] == summary["supervised"]


def setting_is_large(summary: dict) -> bool:
    return summary["setting"]["vocab"] > 100_000


def compared(f: dict, other: dict) -> str:
    """Rounds that overlap are no difference; a single round each says nothing about noise."""
    if f["range"][0] > other["range"][1]:
        return "faster"
    return "SLOWER" if f["range"][1] < other["range"][0] else "level, the rounds overlap"


def verdict(holds: bool) -> str:
    return "yes" if holds else "NO"


def header(results: list[dict], skipped: dict[str, str], seconds: float) -> list[str]:
    versions = {}
    for runs in (run for result in results for run in result["runs"].values()):
        versions |= {key: runs[0][key] for key in ("torch", "transformers", "trl") if key in runs[0]}
    libraries = ", ".join(f"{key} {value}" for key, value in versions.items())
    rounds = max(len(runs) for result in results for runs in result["runs"].values())
    bfloat16 = "" if has_bfloat16() else "; this processor only emulates bfloat16"
    return [
        f"# minitrain, {hardware()}, {datetime.date.today()}",
        "",
        f"{libraries}; {rounds} rounds in {seconds / 60:.0f} minutes; {torch.get_num_threads()} threads; load at the "
        f"end {os.getloadavg()[0]:.1f} (more than the threads: other work disturbed the figures){bfloat16}"
        + "".join(f"; {peer} skipped: {why}" for peer, why in skipped.items()),
        "",
        NOTE,
        "",
    ]


def has_bfloat16() -> bool:
    from minitrain.model.logprobs import cpu_has_bfloat16

    return torch.cuda.is_available() or cpu_has_bfloat16()


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.processor()} x {os.cpu_count()}"
