"""What head.py and divergence.py share: kinds of a computation, each in a process of its own, in turns; their table."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from meter import DTYPES, Meter, median, pick_device


def run(
    about: str, what: str, kinds: tuple[str, ...], sizes: dict[str, int], make: Callable[[argparse.Namespace], Callable]
) -> int:
    """Prints the table and returns the exit status.

    `make(arguments)` gives what a kind is: a function without arguments to its loss, and the leaves whose gradients are
    asked for. The status is 1 when `chunked` takes more than a fifth of plain's peak, is slower, or gives another loss.
    """
    arguments = _parse(about, kinds, sizes)
    if arguments.kind:
        print(json.dumps(_measure(arguments, *make(arguments))))
        return 0
    told = ", ".join(f"{name.replace('_', ' ')} {getattr(arguments, name):,}" for name in sizes if name != "repeats")
    print(f"{told}, {pick_device()}\n")
    print(f"| dtype | {what} | ms | vs plain | peak above inputs, MiB | vs plain | loss |")
    print("|---|---|---:|---:|---:|---:|---:|")
    good = True
    for dtype in DTYPES:
        runs = {kind: [] for kind in kinds}
        for _ in range(arguments.rounds):
            for kind in kinds:
                runs[kind].append(_in_a_process(kind, dtype, {name: getattr(arguments, name) for name in sizes}))
        good &= _tell(dtype, runs)
    return 0 if good else 1


def _parse(about: str, kinds: tuple[str, ...], sizes: dict[str, int]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=kinds, help="measure this one here and print JSON")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    return parser.parse_args()


def _in_a_process(kind: str, dtype: str, sizes: dict[str, int]) -> dict:
    given = [f"--{name.replace('_', '-')}={size}" for name, size in sizes.items()]
    command = [sys.executable, sys.argv[0], f"--kind={kind}", f"--dtype={dtype}", *given]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _measure(arguments: argparse.Namespace, loss_of: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> dict:
    """Peak of the first pass over all; median seconds of the passes after it, gradients dropped between them."""
    device, dtype = pick_device(), DTYPES[arguments.dtype]
    meter = Meter(device)
    meter.begin()
    for _ in range(1 + arguments.repeats):
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        loss.backward()
        meter.tick()
    return {"ms": 1e3 * median(meter.seconds[1:]), "peak_mib": meter.peak_mib(), "loss": loss.item()}


def _tell(dtype: str, runs: dict[str, list[dict]]) -> bool:
    """Prints the lines of one dtype; whether `chunked` keeps its promise."""
    found = {kind: {key: median(one[key] for one in each) for key in each[0]} for kind, each in runs.items()}
    plain, chunked = found["plain"], found["chunked"]
    for kind, f in found.items():
        print(
            f"| {dtype} | {kind} | {f['ms']:,.0f} | {f['ms'] / plain['ms']:.2f} | {f['peak_mib']:,.0f} | "
            f"{f['peak_mib'] / plain['peak_mib']:.2f} | {f['loss']:.4f} |",
            flush=True,
        )
    same = abs(chunked["loss"] - plain["loss"]) <= (1e-4 if dtype == "float32" else 1e-2) * plain["loss"]
    return same and chunked["peak_mib"] <= 0.2 * plain["peak_mib"] and chunked["ms"] <= plain["ms"]
