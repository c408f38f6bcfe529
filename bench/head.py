"""The chunked head alone against plain logits: time and peak memory of loss and gradients.

    python bench/head.py [--tokens 2048] [--hidden 512] [--vocab 128256] [--rounds 3]

`plain` is F.cross_entropy on all logits; `chunked` is what SFT uses, `recomputed` what losses use that do not know
their token weights beforehand. Each runs in its own process, in turns. Exit status 1 when `chunked` takes more than
a fifth of plain's peak above the inputs, is slower than plain, or gives another loss.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from meter import DTYPES, Meter, median, pick_device  # noqa: E402

KINDS = ("plain", "chunked", "recomputed")


def main() -> int:
    arguments = parse_arguments()
    if arguments.kind:
        print(json.dumps(measure(arguments)))
        return 0
    print(f"{arguments.tokens:,} tokens, hidden {arguments.hidden}, vocabulary {arguments.vocab:,}, {pick_device()}\n")
    print("| dtype | head | ms | vs plain | peak above inputs, MiB | vs plain | loss |")
    print("|---|---|---:|---:|---:|---:|---:|")
    good = True
    for dtype in DTYPES:
        runs = {kind: [] for kind in KINDS}
        for _ in range(arguments.rounds):
            for kind in KINDS:
                runs[kind].append(run(kind, dtype, arguments))
        good &= tell(dtype, runs)
    return 0 if good else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="measurements in one process")
    parser.add_argument("--kind", choices=KINDS, help="measure this one here and print JSON")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    return parser.parse_args()


def run(kind: str, dtype: str, arguments: argparse.Namespace) -> dict:
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "hidden", "vocab", "repeats")]
    command = [sys.executable, __file__, f"--kind={kind}", f"--dtype={dtype}", *sizes]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(arguments: argparse.Namespace) -> dict:
    """Peak of the first pass over all; median seconds of the passes after it, gradients dropped between them."""
    device, dtype = pick_device(), DTYPES[arguments.dtype]
    torch.manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.hidden, device=device).requires_grad_()  # [N, H]
    weight = torch.randn(arguments.vocab, arguments.hidden, device=device).mul_(0.05).requires_grad_()  # [V, H]
    targets = torch.randint(arguments.vocab, (arguments.tokens,), device=device)  # [N]
    meter = Meter(device)
    meter.begin()
    for _ in range(1 + arguments.repeats):
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(arguments.kind, hidden, weight, targets)
        loss.backward()
        meter.tick()
    return {"ms": 1e3 * median(meter.seconds[1:]), "peak_mib": meter.peak_mib(), "loss": loss.item()}


def loss_of(kind: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if kind == "plain":
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)
    from minitrain.model.heads import OutputLayer, token_scores

    weights = torch.ones_like if kind == "chunked" else None
    return -token_scores(hidden, targets, OutputLayer(weight), weights).logps.mean()


def tell(dtype: str, runs: dict[str, list[dict]]) -> bool:
    """Prints the lines of one dtype; whether the chunked head keeps its promise."""
    found = {kind: {key: median(run[key] for run in runs[kind]) for key in runs[kind][0]} for kind in KINDS}
    plain = found["plain"]
    for kind, f in found.items():
        print(
            f"| {dtype} | {kind} | {f['ms']:,.0f} | {f['ms'] / plain['ms']:.2f} | {f['peak_mib']:,.0f} | "
            f"{f['peak_mib'] / plain['peak_mib']:.2f} | {f['loss']:.4f} |",
            flush=True,
        )
    chunked = found["chunked"]
    same = abs(chunked["loss"] - plain["loss"]) <= (1e-4 if dtype == "float32" else 1e-2) * plain["loss"]
    return same and chunked["peak_mib"] <= 0.2 * plain["peak_mib"] and chunked["ms"] <= plain["ms"]


if __name__ == "__main__":
    sys.exit(main())
