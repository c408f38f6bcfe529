"""The chunked head alone against plain logits: time and peak memory of loss and gradients.

    python bench/head.py [--tokens 2048] [--hidden 512] [--vocab 128256] [--rounds 3]

`plain` is F.cross_entropy on all logits; `chunked` is what SFT uses, `recomputed` what losses use that do not know
their token weights beforehand. Each runs in its own process, in turns. Exit status 1 when `chunked` takes more than
a fifth of plain's peak above the inputs, is slower than plain, or gives another loss.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from meter import pick_device  # noqa: E402
from turns import run  # noqa: E402

SIZES = {"tokens": 2048, "hidden": 512, "vocab": 128_256, "repeats": 5}


def main() -> int:
    return run(__doc__, "head", ("plain", "chunked", "recomputed"), SIZES, make)


def make(arguments: argparse.Namespace) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    device = pick_device()
    torch.manual_seed(0)
    hidden = torch.randn(arguments.tokens, arguments.hidden, device=device).requires_grad_()  # [N, H]
    weight = torch.randn(arguments.vocab, arguments.hidden, device=device).mul_(0.05).requires_grad_()  # [V, H]
    targets = torch.randint(arguments.vocab, (arguments.tokens,), device=device)  # [N]
    return lambda: loss_of(arguments.kind, hidden, weight, targets), [hidden, weight]


def loss_of(kind: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if kind == "plain":
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)
    from minitrain.model.logprobs import LMHead, chunked_logprobs

    weights = torch.ones_like if kind == "chunked" else None
    return -chunked_logprobs(hidden, targets, LMHead(weight), weights).logps.mean()


if __name__ == "__main__":
    sys.exit(main())
