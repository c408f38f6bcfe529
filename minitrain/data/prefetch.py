"""Prepare the next batches in a thread, while the device computes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
END = object()


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the items of an iterator. A thread computes the next one, while the caller uses the last.

    An error is raised where its item is due. The thread ends when the iterator is exhausted or this one is closed.
    """
    # Each thread begins on the first GPU, where pinned memory would cost every rank a context.
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else ()
    with ThreadPoolExecutor(1, "batches", *device) as thread:
        following = thread.submit(next, items, END)
        while (item := following.result()) is not END:
            following = thread.submit(next, items, END)
            yield item
