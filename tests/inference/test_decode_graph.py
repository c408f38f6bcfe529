"""Decode steps in buckets of rows and columns, and as graphs: the same answers as step by step."""

import contextlib
import gc
import inspect
import logging
import weakref

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from minitrain.inference import decode_graph
from minitrain.inference.choice import Chooser, Request
from minitrain.inference.decode_graph import CUDAGraph, DecodeGraphs, bucket, graphs_for
from minitrain.inference.sampler import Sampler
from minitrain.inference.slots import SlotLoop
from minitrain.model import attention
from minitrain.model.sequence_head import make_policy
from tests.shapes import SHAPE as TINY

pytestmark = pytest.mark.numeric

SHAPE = TINY | {"vocab_size": 96}
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SHAPE)),
    "qwen3-tied": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True)),
    "gpt2-positions": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
}


class Recorded:
    """Replays a step as a CUDA graph does: on the tensors that it was recorded with, into the same output."""

    count = 0

    def __init__(self, step, other):
        self.step, self.hidden = step, step()
        assert other is None or isinstance(other, Recorded)
        type(self).count += 1

    def replay(self):
        return self.hidden.copy_(self.step())


class Refused:
    def __init__(self, step, other):
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")


def policy_of(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    attention.attend_by_document(model)
    return make_policy(model).eval()


def ragged_requests(n=24):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 90, (n,), generator=generator).tolist()
    prompts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]
    return [Request(prompt, [(i, j) for j in range(2)], 3 + 7 * i % 61) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def sample(policy, make_graph, n_slots=12, loops=None):
    sampler = Sampler(policy, (2,), n_slots)

    def make_loop(policy, n_slots):
        loop = SlotLoop(policy, n_slots, make_graph)
        if loops is not None:
            loops.append(loop)
        return loop

    sampler.make_loop = make_loop
    return [one for samples in sampler.sample(ragged_requests(), Chooser(0.9)) for one in samples]


def assert_same(found, want, tolerance=1e-5):
    assert len(want) == 48 and len({len(one.ids) for one in want}) > 20
    for one, other in zip(found, want, strict=True):
        assert one.ids == other.ids
        assert one.logps == pytest.approx(other.logps, abs=tolerance)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("n_slots", [5, 12])
def test_answers_are_those_of_the_loop_without_graphs(name, n_slots, monkeypatch):
    """Rows are exchanged, the batch is rebuilt in more and in fewer columns, and shrinks when no row waits."""
    policy, shapes, run, loops = policy_of(name), [], DecodeGraphs._run, []
    monkeypatch.setattr(DecodeGraphs, "_run", lambda graphs, shape: shapes.append(shape) or run(graphs, shape))
    monkeypatch.setattr(Recorded, "count", 0)
    want = sample(policy, None, n_slots)
    assert not shapes  # on the CPU, nothing is recorded
    assert_same(sample(policy, Recorded, n_slots, loops), want)
    assert loops[0].graphs.works and Recorded.count < len(shapes) / 5
    assert {rows for rows, _ in shapes} == ({5} if n_slots == 5 else {8, 12}) and len(set(shapes)) <= 6


def test_buckets_are_few():
    """4 up to 256 columns and 4 more for each doubling, rows in powers of two: 12 x 7 with 300 slots."""
    shapes = {bucket(rows, columns, 300) for rows in range(1, 301) for columns in range(1, 1025)}
    assert {columns for _, columns in shapes} == {
        *range(64, 257, 64),
        *range(320, 513, 64),
        *range(640, 1025, 128),
    }
    assert {rows for rows, _ in shapes} == {8, 16, 32, 64, 128, 256, 300} and len(shapes) == 84
    for rows, columns in ((1, 1), (9, 65), (257, 513), (300, 1024)):
        n_rows, n_columns = bucket(rows, columns, 300)
        assert rows <= n_rows and columns <= n_columns <= max(64, 1.25 * columns + 63)
    assert bucket(3, 10, 5) == (5, 64)


def test_the_loop_continues_without_graphs_if_a_step_cannot_be_recorded(caplog):
    policy = policy_of("llama")
    want, loops = sample(policy, None), []
    decode_graph._report.cache_clear()
    with caplog.at_level(logging.WARNING, "minitrain"):
        assert_same(sample(policy, Refused, loops=loops), want)
        sample(policy, Refused)
    assert not loops[0].graphs.works
    (line,) = caplog.messages
    assert "not permitted when stream is capturing" in line and "\n" not in line


def test_masked_columns_do_not_matter(monkeypatch):
    """Memory can hold anything when a batch is moved there, such as NaN: 0 times that is not 0."""
    take, reused = DecodeGraphs._take, []

    def take_over_values(graphs, slots):
        before = dict(graphs.memory)
        for tensor in before.values():
            tensor.fill_(torch.nan)
        take(graphs, slots)
        reused.append(bool(before) and all(graphs.memory[key] is tensor for key, tensor in before.items()))

    policy = policy_of("llama")
    want = sample(policy, None)
    monkeypatch.setattr(DecodeGraphs, "_take", take_over_values)
    assert_same(sample(policy, Recorded), want)
    assert any(reused)


class Calls(TorchDispatchMode):
    """Lists the operations with their numbers, and with the memory and shapes of their first inputs."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        described = tree_map(lambda x: tuple(x.shape) if isinstance(x, torch.Tensor) else x, (args, kwargs or {}))
        self.found.append((str(function), str(described)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_can_be_replayed(name, monkeypatch):
    """All steps of a bucket call the same operations with the same numbers, and none that waits for the device."""
    calls, step = {}, DecodeGraphs._step

    def listed(graphs, shape):
        with Calls() as mode:
            hidden = step(graphs, shape)
        calls.setdefault(shape, []).append(mode.found)
        return hidden

    monkeypatch.setattr(DecodeGraphs, "_step", listed)
    sample(policy_of(name), Recorded)
    for first, *others in calls.values():
        assert all(other == first for other in others)
        assert not any(word in name for name, _ in first for word in ("local_scalar", "nonzero", "is_nonzero", "lift"))
    assert max(map(len, calls.values())) > 20


def test_memory_is_free_after_a_round():
    """Nothing refers back to the graphs, so that gigabytes need not wait for the garbage collector."""
    loops = []

    class Kept:
        def __init__(self, step, other):
            self.hidden = step()

        def replay(self):
            return self.hidden

    sample(policy_of("llama"), Kept, loops=loops)
    gc.disable()
    try:
        memory = weakref.ref(next(iter(loops[0].graphs.memory.values())))
        loops.clear()
        assert memory() is None
    finally:
        gc.enable()


def test_graphs_share_memory(monkeypatch):
    """A stand-in for CUDA: a later graph gets the pool of the first one, and an error leaves the current stream."""
    options, streams = [], []

    class Pooled:
        def pool(self):
            return id(self)

        def replay(self):
            options.append("replay")

    @contextlib.contextmanager
    def record(graph, pool=None, capture_error_mode="global"):
        options.append((pool, capture_error_mode))
        yield

    assert {"pool", "capture_error_mode"} <= inspect.signature(torch.cuda.graph).parameters.keys()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Pooled)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(ZeroDivisionError):
        CUDAGraph(lambda: 1 / 0, None)
    assert streams == ["stream"]
    options.clear()
    first = CUDAGraph(lambda: torch.ones(2), None)
    second = CUDAGraph(lambda: torch.zeros(2), first)
    assert second.replay() is second.hidden and first.hidden.sum() == 2
    assert options == [(None, "thread_local"), (first.graph.pool(), "thread_local"), "replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_answers_on_a_gpu(monkeypatch):
    policy, loops = policy_of("llama").to("cuda"), []
    found = sample(policy, None, loops=loops)
    assert loops[0].graphs.works and loops[0].graphs.graphs
    monkeypatch.setattr("minitrain.inference.slots.graphs_for", lambda policy: None)
    assert_same(found, sample(policy, None), tolerance=1e-4)


def test_graphs_are_for_weights_on_one_gpu():
    policy = policy_of("llama")
    assert graphs_for(policy) is None
    policy = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")])
    assert graphs_for(policy) is None
