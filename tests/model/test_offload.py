"""Host copies of the inputs of recomputed blocks: the same gradients, less memory, and what is read when."""

import contextlib
import dataclasses
import weakref

import pytest
import torch

from minitrain.model.decoder import find_blocks
from minitrain.model.offload import HostCopies
from minitrain.model.recompute import checkpoint_activations
from minitrain.tools.preflight.memory import HOST_COPIES, estimate_memory
from minitrain.training.setup import dry_run
from tests.conftest import random_llama

pytestmark = pytest.mark.numeric
N_BLOCKS, N_TOKENS = 4, 27


class Streams:
    """A stand-in for torch.cuda that records what is done on the stream of the copies."""

    def __init__(self):
        self.log: list[str] = []

    def wait_stream(self, other):
        self.log.append("wait")

    @contextlib.contextmanager
    def stream(self, other):
        self.log.append("copy")
        yield


def gradients(mode, copies: HostCopies | None = None, alive: list | None = None):
    model = random_llama(num_hidden_layers=N_BLOCKS)
    inputs = []
    for block in checkpoint_activations(model, mode):
        if copies is not None:
            copies.offload(block)
        block.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    hidden = model.model(input_ids=torch.arange(3, 3 + N_TOKENS)[None], use_cache=False).last_hidden_state
    if alive is not None:
        alive += [reference() is not None for reference in inputs]
        assert copies is None or len(copies.kept) == len(inputs)
    hidden.square().sum().backward()
    assert copies is None or copies.kept == []
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize(("mode", "n"), [("full", N_BLOCKS), ("selective", N_BLOCKS), (2, N_BLOCKS // 2)])
def test_gradients_are_the_same_and_inputs_are_freed(mode, n):
    kept, freed = [], []
    wanted = gradients(mode, None, kept)
    got = gradients(mode, HostCopies(torch.device("cpu")), freed)
    assert kept == [True] * n and freed == [False] * n
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_copies_run_on_their_own_stream_and_one_ahead(monkeypatch):
    """The forward pass waits for no copy. In the backward pass a read begins the copy before it, and waits once."""
    streams, empty_like = Streams(), torch.empty_like
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams)
    monkeypatch.setattr(torch.cuda, "stream", streams.stream)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, pin_memory, **rest: empty_like(tensor, **rest))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: streams.log.append("record"))
    copies = HostCopies(torch.device("cpu"))
    copies.stream = streams
    saved = [copies.save(torch.randn(3)) for _ in range(3)]
    assert streams.log == ["wait", "copy", "record"] * 3
    streams.log.clear()
    for copy in reversed(saved):
        assert torch.equal(copies._read(copy), copy.host)
    now, ahead = ["wait", "record"], ["copy"]
    assert streams.log == ["copy", *now, *ahead, *now, *ahead, *now] and copies.kept == []


def test_without_gradients_nothing_is_copied():
    copies, model = HostCopies(torch.device("cpu")), random_llama()
    for block in checkpoint_activations(model, "full"):
        copies.offload(block)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 30)[None])
    assert copies.kept == []


def test_the_estimate_counts_copies_on_the_host(make_trainer):
    """One input of each block, of which the device holds none."""
    trainer = make_trainer("activation_checkpointing=full", "n_steps=1", "total_batch_size=1")
    without, with_copies = (
        estimate_memory(dry_run(dataclasses.replace(trainer.config, activation_offload=offloads)), torch.device("cuda"))
        for offloads in (False, True)
    )
    longest = int(trainer.train_loader.lengths.max())
    n_blocks, width = len(find_blocks(trainer.policy.model)), trainer.policy.model.config.hidden_size
    assert with_copies.parts[HOST_COPIES] == 4 * longest * width * n_blocks
    assert HOST_COPIES in with_copies.elsewhere and HOST_COPIES not in without.parts
    assert with_copies.parts["activations"] < without.parts["activations"]
    assert with_copies.peak < without.peak
