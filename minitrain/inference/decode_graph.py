"""Run decode steps as CUDA graphs: one launch for all kernels of a step.

Without a graph, Python launches the kernels of a decode step one by one, which takes longer than they run. A graph
replays kernels with the same shapes, on the same memory. So a step computes R rows and C columns, two numbers of a
small set (a bucket), and has a graph for each of them. Keys and values stay in memory that all buckets share. The
device knows the current column, and a mask hides the columns after it. Rows that are not in use compute zeros.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from minitrain.model.diagnostics import first_line, log_warning
from minitrain.model.load_check import uses_fsdp
from minitrain.model.policy import Policy

if TYPE_CHECKING:
    from .slots import SlotLoop, _Slots

MIN_ROWS = 8  # fewer rows take as long: the weights are read in any case
MIN_STEP = 64  # columns
MakeGraph = Callable[[Callable[[], Tensor], "CUDAGraph | None"], "CUDAGraph"]  # (step, other graph) -> its graph


class CUDAGraph:
    """A CUDA graph of a step.

    Args:
        step: Returns hidden states [R, H]. It has run before.
        other: A graph to share memory with. The two never run at the same time.
    """

    def __init__(self, step: Callable[[], Tensor], other: "CUDAGraph | None"):
        self.graph = torch.cuda.CUDAGraph()
        pool = None if other is None else other.graph.pool()
        stream = torch.cuda.current_stream()
        try:  # threads that prepare batches can use the device meanwhile
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.hidden = step()
        finally:
            torch.cuda.set_stream(stream)  # torch leaves that of the recording after an error

    def replay(self) -> Tensor:
        """Run the step on its inputs, and return hidden states [R, H], which the next replay overwrites."""
        self.graph.replay()
        return self.hidden


def graphs_for(policy: Policy) -> MakeGraph | None:
    """Return how to record the decode steps of a policy: not on the CPU, nor with FSDP or weights on other devices."""
    devices = {parameter.device for parameter in policy.parameters()}
    if len(devices) > 1 or devices.pop().type != "cuda" or uses_fsdp(policy):
        return None
    return CUDAGraph


def forward(decoder: nn.Module, inputs: dict, mask: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
    """Return the hidden states of tokens, [R, T, H], and add their keys and values to the cache."""
    options = {"past_key_values": cache, "use_cache": True, "return_dict": True}
    return decoder(**inputs, attention_mask=mask, position_ids=positions, **options).last_hidden_state


def bucket(n_rows: int, n_columns: int, n_slots: int) -> tuple[int, int]:
    """Return the numbers of rows and columns with which a step is computed.

    Rows are a power of two or `n_slots`. From 256 columns on, there are four buckets before the number doubles.
    """
    rows = min(max(MIN_ROWS, 1 << (n_rows - 1).bit_length()), n_slots)
    step = max(MIN_STEP, 1 << max(0, (n_columns - 1).bit_length() - 3))
    return rows, -(-n_columns // step) * step


class _StaticColumns(CacheLayerMixin):
    """Keys and values of one layer, [R, heads, C, d], that a step changes at `column`, a tensor [1]."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor):
        super().__init__()
        self.keys, self.values, self.column, self.is_initialized = keys, values, column, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the layer has its memory."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write one column, and return all of them."""
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class DecodeGraphs:
    """The decode steps of a loop, as one graph for each bucket. Its first step runs as usual, which warms it up.

    Args:
        loop: The loop, whose model takes masks [R, 1, 1, C].
        make_graph: Records a step.

    Attributes:
        works: Whether all steps could be recorded. If not, the loop continues without graphs.
    """

    def __init__(self, loop: "SlotLoop", make_graph: MakeGraph):
        self.decoder, self.make_graph, self.works = loop.decoder, make_graph, True
        self.n_slots, self.max_position = loop.n_slots, loop.max_position
        self.ids, self.starts = torch.zeros(2, loop.n_slots, dtype=torch.int64, device=loop.device)  # [n_slots] each
        self.column = torch.zeros(1, dtype=torch.int64, device=loop.device)
        self.memory: dict[tuple[int, str], Tensor] = {}  # (layer, keys or values) -> flat tensor
        self.size = 0  # rows * columns in this memory
        self.cache: Cache | None = None  # the one whose keys and values are in it
        self.caches: dict[tuple[int, int], Cache] = {}  # bucket -> keys and values
        self.graphs: dict[tuple[int, int], CUDAGraph] = {}

    def __call__(self, slots: "_Slots", ids: Tensor) -> Tensor:
        """Append tokens [S] to the rows, and return their hidden states [S, H] until the next call."""
        if self.cache is not slots.cache:
            self._take(slots)
        n = len(ids)
        self.ids[:n], self.starts[:n] = ids, slots.starts
        self.column.fill_(slots.columns)
        hidden = self._run(bucket(n, slots.layers[0].keys.shape[2], self.n_slots))
        for layer in slots.layers:
            layer.n += 1
        return hidden[:n]

    def _run(self, shape: tuple[int, int]) -> Tensor:
        if shape not in self.caches:
            self.caches[shape] = self._static_cache(shape)
            return self._step(shape)
        if shape not in self.graphs:
            step, other = functools.partial(self._step, shape), next(iter(self.graphs.values()), None)
            try:
                self.graphs[shape] = self.make_graph(step, other)
            except Exception as error:  # such as an operation that waits for the device
                self.works = False
                _report(first_line(error))
                return step()
        return self.graphs[shape].replay()

    def _step(self, shape: tuple[int, int]) -> Tensor:
        """Return hidden states [R, H]. All that differs between steps of a shape is in tensors."""
        starts, columns = self.starts[: shape[0], None], torch.arange(shape[1], device=self.column.device)
        mask = (columns >= starts) & (columns <= self.column)  # [R, C]
        positions = (self.column - starts).clamp(max=self.max_position)  # [R, 1]
        inputs = {"input_ids": self.ids[: shape[0], None]}
        return forward(self.decoder, inputs, mask[:, None, None], positions, self.caches[shape])[:, -1]

    def _take(self, slots: "_Slots") -> None:
        """Move the keys and values of rows into the memory of the graphs. A larger one needs new graphs."""
        self.cache, n = slots.cache, len(slots.starts)
        self.starts.zero_()  # rows that are not in use must not begin after the current column
        shape = bucket(n, slots.layers[0].keys.shape[2], self.n_slots)
        if math.prod(shape) > self.size:
            self.graphs.clear(), self.caches.clear(), self.memory.clear()
            self.size = math.prod(shape)
        for number, layer in enumerate(slots.cache.layers):
            for name in ("keys", "values") if layer.is_initialized else ():  # else it uses those of another layer
                tensor = getattr(layer, name)
                _, heads, width, size = tensor.shape
                if (number, name) not in self.memory:
                    self.memory[number, name] = tensor.new_empty(self.size * heads * size)
                space = self._space(number, name, shape).zero_()
                space[:n, :, :width] = tensor
                setattr(layer, name, space[:n])

    def _space(self, number: int, name: str, shape: tuple[int, int]) -> Tensor:
        """Return the memory of a layer as [R, heads, C, d]. Fewer rows with the same columns are the first ones."""
        heads, size = getattr(self.cache.layers[number], name).shape[1::2]
        count = math.prod(shape) * heads * size
        return self.memory[number, name][:count].view(shape[0], heads, shape[1], size)

    def _static_cache(self, shape: tuple[int, int]) -> Cache:
        layers: list[CacheLayerMixin] = []
        for number, layer in enumerate(self.cache.layers):
            if layer.is_initialized:
                keys, values = (self._space(number, name, shape) for name in ("keys", "values"))
                layer = _StaticColumns(keys, values, self.column)
            layers.append(layer)
        return Cache(layers=layers)


@functools.cache
def _report(reason: str) -> None:
    """Log once that steps are not recorded."""
    log_warning(f"sampling: decode steps run without CUDA graphs: {reason}")
