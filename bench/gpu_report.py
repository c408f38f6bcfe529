"""The results of `bench/gpu.py` as JSON and as tables in markdown, rewritten after every measurement."""

import json
import re
import statistics
from dataclasses import asdict
from pathlib import Path

from gpu_rows import MINUTES, Row, Shape

TITLES = {
    "A": "Whether everything runs, and what the device does",
    "B": "1B, all weights trained",
    "C": "8B",
}
NOTE = """\
The models are random, with the shapes of Llama-3.2-1B and Llama-3.1-8B. A step has 16,384 or 4,096 tokens in documents
of a median of 400 tokens, all of which but the first are trained on, the same ones for every trainer. tok/s is the
median over the timed steps, and counts no padding. MFU is (6 N T + 6 L H sum t^2) / seconds / peak, with N the weights
that a token is multiplied with (4 N for LoRA), T the tokens, t the lengths of the documents, and the peak of dense
bfloat16 products; what is computed again does not count. Peak memory is all that the process had allocated on a GPU (on
a CPU, its resident memory). The last column is the largest relative difference of a step's loss from the plain
loop's."""


def write(results: list[dict], machine: dict, folder: Path, stem: str) -> None:
    """Replace both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", as_json(results, machine)), (".md", as_markdown(results, machine))):
        scratch = folder / f"{stem}{suffix}.new"
        scratch.write_text(text)
        scratch.replace(folder / f"{stem}{suffix}")


def as_json(results: list[dict], machine: dict) -> str:
    plain = [{**result, "row": asdict(result["row"]), "rates": rates(result, machine)} for result in results]
    return json.dumps({"machine": machine, "results": plain}, indent=1) + "\n"


def as_markdown(results: list[dict], machine: dict) -> str:
    facts = [f"{key} {value}" for key, value in machine.items() if value and key not in ("card", "date", "peak")]
    lines = [f"# {machine['card']}, {machine['date']}", "", "; ".join(facts) + ".", "", NOTE, ""]
    for phase in MINUTES:
        found = [result for result in results if result["row"].phase == phase]
        if found:
            checks = [*check_lines(found), ""] if phase == "A" else []
            lines += [f"## {phase}. {TITLES[phase]}", "", *checks]
            lines += speed_table([result for result in found if is_speed(result["row"])], results, machine)
            lines += skipped_lines(found)
    return "\n".join(lines) + "\n"


def is_speed(row: Row) -> bool:
    return row.work not in ("build", "rates", "resume", "waits", "profile", "losses")


# --------------------------------------------------------------------------------------------------------- numbers


def rates(result: dict, machine: dict) -> dict:
    """The numbers of one row of a speed table; empty without a timed step."""
    row, found = result["row"], result["found"]
    timed = found.get("seconds", [])[row.warmup :]
    if not is_speed(row) or not timed:
        return {}
    seconds = statistics.median(timed)
    numbers = {"seconds": seconds, "steps": len(timed), "peak_gib": found.get("peak_mib", 0) / 1024}
    if "pairs" in found:
        return numbers | {"pairs_per_second": found["pairs"] / seconds}
    numbers["tokens_per_second"] = found["tokens"] / seconds
    if machine.get("peak") and row.trained:
        work = flops(Shape(**result["sizes"]), found["tokens"], found["squares"], row.trained)
        numbers["mfu"] = work / seconds / machine["peak"]
    return numbers


def flops(shape: Shape, tokens: float, squares: float, trained: float = 1.0) -> float:
    """6 N T + 6 L H sum t^2; `trained` is the share of the 6 that the weights take."""
    return 6 * trained * shape.n_matmul * tokens + 6 * shape.layers * shape.hidden * squares


def difference(result: dict, results: list[dict]) -> float | None:
    """The largest relative difference of a loss from the plain loop's on the same documents, over its steps."""
    row = result["row"]
    for other in results:
        same = other["row"].shape == row.shape and other["row"].tokens == row.tokens and not row.pairs
        same = same and row.work != "sampling"
        if same and other["row"].work == "plain" and other is not result:
            pairs = list(zip(result["found"].get("losses", []), other["found"].get("losses", [])))
            return max((abs(a - b) / abs(b) for a, b in pairs), default=None)
    return None


# ----------------------------------------------------------------------------------------------------------- lines


def speed_table(found: list[dict], results: list[dict], machine: dict) -> list[str]:
    lines = []
    for result in found:
        numbers = rates(result, machine)
        if not numbers:
            continue
        speed = f"{numbers['tokens_per_second']:,.0f}" if "tokens_per_second" in numbers else ""
        speed = speed or f"{numbers['pairs_per_second']:.2f} pairs/s"
        mfu = f"{numbers['mfu']:.1%}" if "mfu" in numbers else "-"
        off = difference(result, results)
        lines.append(
            f"| {result['row'].name} | {speed} | {mfu} | {numbers['peak_gib']:.1f} | {numbers['steps']} | "
            f"{power(result)} | {'-' if off is None else f'{off:.1e}'} | {remark(result)} |"
        )
    head = ["| | tok/s | MFU | peak GiB | steps | W | loss | |", "|---|---:|---:|---:|---:|---:|---:|---|"]
    return [*head, *lines, ""] if lines else []


def power(result: dict) -> str:
    watts = result.get("watts") or []
    return f"{statistics.median(sorted(watts)[len(watts) // 2 :]):.0f}" if watts else "-"  # while it was busy


def remark(result: dict) -> str:
    parts = [result["found"].get("note", "")]
    parts.append("stopped at its limit" if result["status"] == "limit" else "")
    parts.append("failed later" if result["status"] == "failed" else "")
    return "; ".join(filter(None, parts))


def skipped_lines(found: list[dict]) -> list[str]:
    lines = [f"- {r['row'].name}: {r['status']}: {r['why']}" for r in found if r["status"] != "done"]
    return ["Not measured, or not to the end:", "", *lines, ""] if lines else []


def check_lines(found: list[dict]) -> list[str]:
    """Phase A in words."""
    lines = []
    for result in found:
        lines += describe(result["row"], result["found"])
    return lines


def describe(row: Row, found: dict) -> list[str]:
    if "tflops_bfloat16" in found:
        return [
            f"- products {found['tflops_bfloat16']:,.1f} TFLOP/s in bfloat16, {found['tflops_float32']:,.1f} in "
            f"float32; copies {found['tb_per_second']:.2f} TB/s, read and written"
        ]
    if "same" in found:
        mode = "deterministic" if found["deterministic"] else "not deterministic"
        return [f"- {row.name} ({mode}): {'yes' if found['same'] else 'NO'}"]
    if "waits" in found:
        places = ", ".join(f"{place} x {count}" for place, count in found["waits_by_line"].items())
        return [f"- {row.name}: {found['waits']} ({places})"]
    if "longest" in found:
        lines = [f"- {row.name}: {found['step_seconds'] * 1e3:,.1f} ms, {found['kernels']:,} kernels"]
        lines[0] += f", busy {found['busy']:.0%}"
        return lines + [f"    - {k['ms']:.2f} ms, {k['count']} x {escaped(k['name'])}" for k in found["longest"]]
    if "losses_of" in found:
        table = found["losses_of"]
        good = [entry for entry in table if "difference" in entry]
        worst = max((entry["difference"] for entry in good), default=0)
        lines = [f"- {row.name}: {len(good)} of {len(table)} ran; largest relative difference {worst:.1e}"]
        return lines + [f"    - {name_of(e)}: {escaped(e['error'])}" for e in table if "error" in e]
    return []


def name_of(entry: dict) -> str:
    return f"{entry['loss']}, {'LoRA' if entry['lora'] else 'full'}, {'packed' if entry['packing'] else 'padded'}"


def escaped(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
