"""The chunked divergence from a teacher against whole tables of logits: time and peak memory of loss and gradients.

    python bench/divergence.py [--tokens 2048] [--hidden 512] [--teacher-hidden 768] [--vocab 128256] [--rounds 3]

The loss is that of kd with its defaults: KL(T||S) at temperature 4 and the cross entropy. `plain` makes it from all
logits with F.kl_div and F.cross_entropy; `chunked` is what kd uses, `top-64` the same on the teacher's 64 likeliest
tokens and the rest, `noted` the same from a file of them, without a teacher. Each runs in its own process, in turns.
Exit status 1 when `chunked` takes more than a fifth of plain's peak above the inputs, is slower than plain, or gives
another loss.
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

KINDS = ("plain", "chunked", "top-64", "noted")
TEMPERATURE, ALPHA, BETA, TOP_K = 4.0, 0.7, 0.3, 64


def main() -> int:
    arguments = parse_arguments()
    if arguments.kind:
        print(json.dumps(measure(arguments)))
        return 0
    widths = f"hidden {arguments.hidden}, teacher's {arguments.teacher_hidden}"
    print(f"{arguments.tokens:,} tokens, {widths}, vocabulary {arguments.vocab:,}, {pick_device()}\n")
    print("| dtype | divergence | ms | vs plain | peak above inputs, MiB | vs plain | loss |")
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
    parser.add_argument("--teacher-hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="measurements in one process")
    parser.add_argument("--kind", choices=KINDS, help="measure this one here and print JSON")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    return parser.parse_args()


def run(kind: str, dtype: str, arguments: argparse.Namespace) -> dict:
    given = vars(arguments).items()
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in given if isinstance(value, int)]
    command = [sys.executable, __file__, f"--kind={kind}", f"--dtype={dtype}", *sizes]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(arguments: argparse.Namespace) -> dict:
    """Peak of the first pass over all; median seconds of the passes after it, gradients dropped between them."""
    device, dtype = pick_device(), DTYPES[arguments.dtype]
    n, vocab = arguments.tokens, arguments.vocab
    torch.manual_seed(0)
    hidden = torch.randn(n, arguments.hidden, device=device).requires_grad_()  # [N, H_s]
    weight = torch.randn(vocab, arguments.hidden, device=device).mul_(0.05).requires_grad_()  # [V, H_s]
    theirs = torch.randn(n, arguments.teacher_hidden, device=device)  # [N, H_t]
    matrix = torch.randn(vocab, arguments.teacher_hidden, device=device).mul_(0.05).to(dtype)  # [V, H_t]
    targets = torch.randint(vocab, (n,), device=device)  # [N]
    loss_of = {"plain": plain}.get(arguments.kind) or chunked(arguments.kind, theirs, matrix)
    meter = Meter(device)
    meter.begin()
    for _ in range(1 + arguments.repeats):
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(hidden, weight, theirs, matrix, targets)
        loss.backward()
        meter.tick()
    return {"ms": 1e3 * median(meter.seconds[1:]), "peak_mib": meter.peak_mib(), "loss": loss.item()}


def plain(hidden, weight, theirs, matrix, targets) -> torch.Tensor:
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(theirs.to(matrix.dtype), matrix).float() / TEMPERATURE, -1)  # [N, V]
    logits = F.linear(hidden, weight).float()  # [N, V]
    student = F.log_softmax(logits / TEMPERATURE, -1)  # [N, V]
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return ALPHA * TEMPERATURE**2 * divergence + BETA * F.cross_entropy(logits, targets)


def chunked(kind: str, theirs: torch.Tensor, matrix: torch.Tensor):
    from minitrain.batch import Distillation
    from minitrain.losses.kd import forward_kl
    from minitrain.model.divergence import divergences, likeliest
    from minitrain.model.heads import OutputLayer

    states = theirs, OutputLayer(matrix)
    source = likeliest(*states, TEMPERATURE, TOP_K) if kind == "noted" else states
    weights, top_k = (ALPHA * TEMPERATURE**2, BETA), None if kind == "chunked" else TOP_K

    def loss_of(hidden, weight, theirs, matrix, targets) -> torch.Tensor:
        asked = Distillation(source, forward_kl, TEMPERATURE, top_k, weights)
        logps, divergence = divergences(hidden, targets, OutputLayer(weight), asked)
        return (weights[0] * divergence - weights[1] * logps).mean()

    return loss_of


def tell(dtype: str, runs: dict[str, list[dict]]) -> bool:
    """Prints the lines of one dtype; whether the chunked divergence keeps its promise."""
    found = {kind: {key: median(run[key] for run in runs[kind]) for key in runs[kind][0]} for kind in KINDS}
    first = found["plain"]
    for kind, f in found.items():
        print(
            f"| {dtype} | {kind} | {f['ms']:,.0f} | {f['ms'] / first['ms']:.2f} | {f['peak_mib']:,.0f} | "
            f"{f['peak_mib'] / first['peak_mib']:.2f} | {f['loss']:.4f} |",
            flush=True,
        )
    ours = found["chunked"]
    same = abs(ours["loss"] - first["loss"]) <= (1e-4 if dtype == "float32" else 1e-2) * first["loss"]
    return same and ours["peak_mib"] <= 0.2 * first["peak_mib"] and ours["ms"] <= first["ms"]


if __name__ == "__main__":
    sys.exit(main())
