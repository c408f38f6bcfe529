"""Compile the blocks of a model with torch.compile, and report when they do not run compiled.

torch.compile says nothing when a block falls back to Python. So a block is first compiled as one graph, which raises an
error if it cannot be one.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from .diagnostics import first_line
from .quantize import prepare_for_compiling

MAX_GRAPHS = 64  # of one kind of block: training or evaluation, packed or padded, for each kind of attention


def compile_blocks(blocks: Iterable[nn.Module], warn: Callable[[str], None]) -> None:
    """Compile each block. Blocks with a key-value cache run in Python, as in generation.

    Args:
        blocks: The blocks. Those of one class share their graphs.
        warn: Reports a line if blocks do not run as one graph.
    """
    import torch._dynamo as dynamo

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MAX_GRAPHS)
    reported: dict[type, str] = {}  # class of blocks that are not one graph -> reason
    for block in blocks:
        prepare_for_compiling(block)
        block.forward = _compile(block, reported, warn)


def _compile(block: nn.Module, reported: dict[type, str], warn: Callable[[str], None]) -> Callable:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from transformers import Cache

    forward, kind, parameters = block.forward, type(block), list(block.parameters())
    one_graph = torch.compile(forward, dynamic=True, fullgraph=True)
    with_breaks = torch.compile(forward, dynamic=True)

    def report(reason: str) -> None:
        if kind not in reported:
            reported[kind] = reason
            warn(f"compile: blocks of {kind.__name__} run partly in Python: {reason}")

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            if torch.is_grad_enabled():
                report("in training, they have a key-value cache, as with prefix tuning.")
            return forward(*args, **kwargs)  # a cache would need a graph for each layer
        with _hidden_gradients(parameters):
            if kind not in reported:
                try:
                    return one_graph(*args, **kwargs)
                except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                    report(_reason(error))
            return with_breaks(*args, **kwargs)

    return run


@contextlib.contextmanager
def _hidden_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Hide gradients of another dtype than their parameters', with which dynamo traces no graph."""
    hidden = [(p, p.grad) for p in parameters if p.grad is not None and p.grad.dtype != p.dtype]
    for parameter, _ in hidden:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, grad in hidden:
            parameter.grad = grad


def _reason(error: Exception) -> str:
    """Return what an error of torch.compile says, with its explanation if it has one."""
    lines = [line.partition("Explanation: ")[2] for line in str(error.__cause__ or error).splitlines()]
    explanation = next(filter(None, lines), "")
    return f"{first_line(error)} {explanation}".rstrip(". ") + "."
