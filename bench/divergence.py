"""The chunked divergence from a teacher against whole tables of logits: time and peak memory of loss and gradients.

    python bench/divergence.py [--tokens 2048] [--hidden 512] [--teacher-hidden 768] [--vocab 128256] [--rounds 3]

The loss is that of kd with its defaults: KL(T||S) at temperature 4 and the cross entropy. `plain` makes it from all
logits with F.kl_div and F.cross_entropy; `chunked` is what kd uses, `top-64` the same on the teacher's 64 likeliest
tokens and the rest, `noted` the same from a file of them, without a teacher. Each runs in its own process, in turns.
Exit status 1 when `chunked` takes more than a fifth of plain's peak above the inputs, is slower than plain, or gives
another loss.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from meter import DTYPES, pick_device  # noqa: E402
from turns import run  # noqa: E402

SIZES = {"tokens": 2048, "hidden": 512, "teacher_hidden": 768, "vocab": 128_256, "repeats": 3}
TEMPERATURE, ALPHA, BETA, TOP_K = 4.0, 0.7, 0.3, 64


def main() -> int:
    return run(__doc__, "divergence", ("plain", "chunked", "top-64", "noted"), SIZES, make)


def make(arguments: argparse.Namespace) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    device, dtype = pick_device(), DTYPES[arguments.dtype]
    n, vocab = arguments.tokens, arguments.vocab
    torch.manual_seed(0)
    hidden = torch.randn(n, arguments.hidden, device=device).requires_grad_()  # [N, H_s]
    weight = torch.randn(vocab, arguments.hidden, device=device).mul_(0.05).requires_grad_()  # [V, H_s]
    theirs = torch.randn(n, arguments.teacher_hidden, device=device)  # [N, H_t]
    matrix = torch.randn(vocab, arguments.teacher_hidden, device=device).mul_(0.05).to(dtype)  # [V, H_t]
    targets = torch.randint(vocab, (n,), device=device)  # [N]
    loss_of = plain if arguments.kind == "plain" else chunked(arguments.kind, theirs, matrix)
    return lambda: loss_of(hidden, weight, theirs, matrix, targets), [hidden, weight]


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
    from minitrain.model.kd_divergence import divergences, top_k_logprobs
    from minitrain.model.logprobs import LMHead

    states = theirs, LMHead(matrix)
    source = top_k_logprobs(*states, TEMPERATURE, TOP_K) if kind == "noted" else states
    weights, top_k = (ALPHA * TEMPERATURE**2, BETA), None if kind == "chunked" else TOP_K

    def loss_of(hidden, weight, theirs, matrix, targets) -> torch.Tensor:
        asked = Distillation(source, forward_kl, TEMPERATURE, top_k, weights)
        logps, divergence, _ = divergences(hidden, targets, LMHead(weight), asked)
        return (weights[0] * divergence - weights[1] * logps).mean()

    return loss_of


if __name__ == "__main__":
    sys.exit(main())
