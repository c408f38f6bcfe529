"""Run a check of a model with one block of each kind, which is much faster than with all of them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .decoder import find_blocks
from .policy import Policy

INDEX_NAME = re.compile("idx|index|layer_id|number")  # attributes that count the blocks


def with_few_blocks(policy: Policy, check: Callable[[], None]) -> None:
    """Run a check with one block of each kind; if it fails, run it with all blocks, whose error counts.

    Raises:
        Exception: The error of the check with all blocks.
    """
    blocks, kept = find_blocks(policy.model), distinct_blocks(policy)
    if len(kept) < len(blocks):
        try:
            with _only(policy, kept):
                return check()
        except (torch.OutOfMemoryError, torch.distributed.DistError):
            raise
        except Exception:  # a model without some of its blocks can raise any error
            pass
    check()


def distinct_blocks(policy: Policy) -> list[int]:
    """Return the numbers of the first blocks of each kind: modules, shapes, options and layer type."""
    lists, first = _lists_by_block(policy), {}
    for number, block in enumerate(find_blocks(policy.model)):
        first.setdefault((*_signature(block), *(str(values[number]) for values in lists.values())), number)
    return list(first.values())


def _signature(block: nn.Module) -> tuple:
    """Return the shapes of a block's parameters, and the types and plain attributes of its modules."""
    shapes = [(name, tuple(parameter.shape)) for name, parameter in block.named_parameters()]
    options = [
        (name, type(module), key, value)
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and key[0] != "_" and not INDEX_NAME.search(key)
    ]
    return (*shapes, *options)


def _lists_by_block(policy: Policy) -> dict[str, list]:
    """Return the lists in the model's config with a value for each block, such as `layer_types`."""
    n_blocks = len(find_blocks(policy.model))
    options = vars(policy.model.config.get_text_config())
    return {key: value for key, value in options.items() if isinstance(value, list | tuple) and len(value) == n_blocks}


@contextmanager
def _only(policy: Policy, kept: list[int]) -> Iterator[None]:
    """Within the context, the model has only the blocks with these numbers."""
    blocks, lists = find_blocks(policy.model), _lists_by_block(policy)
    config, all_blocks = policy.model.config.get_text_config(), list(blocks)
    del blocks[:]
    blocks.extend(all_blocks[number] for number in kept)
    vars(config).update({key: [values[number] for number in kept] for key, values in lists.items()})
    try:
        yield
    finally:
        del blocks[:]
        blocks.extend(all_blocks)
        vars(config).update(lists)
