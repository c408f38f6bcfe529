"""Sample responses with a decode loop: each prompt is computed once, and responses that end leave the batch.

All rows of the batch write their next key and value in the same column. So rows are aligned on the right: a row of n
tokens occupies the last n columns, and its attention mask hides the others. A response that waits takes the row of one
that ended, with the keys and values of its prompt in front of the current column.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from minitrain.model.decoder import decoder_of
from minitrain.model.policy import Policy

from .choice import Row, TokenChoice
from .decode_graph import DecodeGraphs, MakeGraph, forward, graphs_for

PREFILL_TOKENS = 1 << 14  # tokens of the prompts that are computed at once
REFILL_FRACTION = 8  # rows are exchanged when an eighth of them has ended
AHEAD_FRACTION = 4  # with the prompts of new rows, those of the next quarter of the slots are computed
COPIED = 8  # rows that are copied at once, which takes their memory a third time
BLOCK = 64  # columns are allocated in blocks
SLOTS = range(64, 513)  # number of rows by default: as many as fit into SLOT_BYTES
SLOT_BYTES = 1 << 30


class _Columns(CacheLayerMixin):
    """Keys and values of one layer, [S, heads, columns, d], of which the first n columns are used."""

    is_sliding = False  # the attention mask has the window
    n = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add columns. Those of a prompt are a tensor of their own, to which one can add again."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values, self.n = key_states, value_states, key_states.shape[2]
            return key_states, value_states
        stop = self.n + key_states.shape[2]
        if stop > self.keys.shape[2]:
            self.keys, self.values = torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)
        else:
            self.keys[:, :, self.n : stop], self.values[:, :, self.n : stop] = key_states, value_states
        self.n = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def fill(self, sources: "list[tuple[_Columns, Tensor]]", width: int, capacity: int) -> None:
        """Take rows of other layers, aligned on the right in the first `width` of `capacity` columns."""

        def joined(name: str) -> Tensor:
            tensors = [(getattr(layer, name), layer.n, indices) for layer, indices in sources]
            _, heads, _, size = tensors[0][0].shape
            n_rows = sum(len(indices) for _, _, indices in tensors)
            space, row = tensors[0][0].new_zeros(n_rows, heads, capacity, size), 0
            for tensor, n, indices in tensors:
                used = min(n, width)
                for some in indices.split(COPIED):
                    space[row : row + len(some), :, width - used : width] = tensor[some, :, n - used : n]
                    row += len(some)
            return space

        keys, values = joined("keys"), joined("values")
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.n = keys, values, width

    def put(self, rows: Tensor, source: "_Columns", indices: Tensor) -> None:
        """Replace rows by rows of another layer that has at most as many columns, aligned on the right."""
        first = self.n - source.n
        self.keys[rows, :, first : self.n] = source.keys[indices, :, : source.n]
        self.values[rows, :, first : self.n] = source.values[indices, :, : source.n]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n + query_length, 0

    def get_seq_length(self) -> int:
        return self.n

    def get_max_length(self) -> int:
        return -1


class _Slots(NamedTuple):
    """The state of S rows, which are aligned on the right in the columns of `cache`."""

    cache: Cache
    starts: Tensor  # [S] first column of each row
    hidden: Tensor  # [S, H] last hidden states
    is_padded: bool  # whether a row begins after the first column

    @property
    def columns(self) -> int:
        return self.cache.get_seq_length()

    @property
    def layers(self) -> list[_Columns]:
        """The layers with keys and values of their own."""
        return [layer for layer in self.cache.layers if isinstance(layer, _Columns) and layer.is_initialized]


def fitting_slots(policy: Policy, length: int) -> int:
    """Return how many rows of `length` tokens to sample at the same time.

    More rows make responses of different lengths cheaper, until their keys and values take much memory.
    """
    config = policy.model.config.get_text_config()
    n_heads = getattr(config, "num_attention_heads", None) or 1
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    of_token = 2 * config.num_hidden_layers * n_kv_heads * head_size * policy.model.dtype.itemsize
    of_logits = 4 * config.vocab_size
    return min(max(SLOTS[0], SLOT_BYTES // (of_token * length + of_logits)), SLOTS[-1])


class SlotLoop:
    """Samples tokens in a batch whose rows are exchanged.

    Args:
        policy: The policy, in eval mode.
        n_slots: Maximum number of rows of the batch.
        make_graph: How to record decode steps (default: as CUDA graphs, on a GPU).
    """

    def __init__(self, policy: Policy, n_slots: int, make_graph: MakeGraph | None = None):
        self.policy, self.decoder, self.n_slots = policy, decoder_of(policy.model), n_slots
        self.device = policy.model.get_input_embeddings().weight.device
        self.n_virtual = policy.model.soft_prompt.n_tokens if policy.has_soft_prompt else 0
        self.max_columns = self.n_virtual + policy.position_limit  # some models, such as MPT, have no more
        self.max_position = self.n_virtual + policy.rotary_limit - 1
        # Models with this attention pass on a mask of four dimensions. It saves the one that they would make.
        self.makes_masks = policy.supports_document_masking and all(
            type(layer) is DynamicLayer for layer in DynamicCache(config=policy.model.config).layers
        )
        make_graph = make_graph or graphs_for(policy)
        self.graphs = DecodeGraphs(self, make_graph) if make_graph is not None and self.makes_masks else None
        self.prompts: dict[int, list[int]] = {}  # request -> token ids
        self.computed: dict[int, tuple[_Slots, int]] = {}  # request -> its prompt, while some of its responses wait

    @staticmethod
    def supports(policy: Policy) -> bool:
        """Return whether all layers of a model keep plain keys and values, so that rows can be exchanged."""
        kinds = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
        return all(type(layer) in kinds for layer in DynamicCache(config=policy.model.config).layers)

    def run(self, rows: Sequence[Row], choice: TokenChoice) -> None:
        """Sample all tokens of rows."""
        self.prompts = {row.request: row.prompt for row in rows}
        waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))
        active: list[Row] = []
        slots, n_ended = None, 0
        while waiting or n_ended < len(active):
            free = self.n_slots - len(active) + n_ended
            has_news = n_ended * REFILL_FRACTION > len(active) or (waiting and free * REFILL_FRACTION >= self.n_slots)
            if slots is None or has_news or self._is_full(slots):
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                self._compute_prompts(new, itertools.islice(waiting, self.n_slots // AHEAD_FRACTION))
                change = self._exchange if slots is not None and self._have_space(slots, new) else self._rebuild
                slots, active = change(slots, active, new)
                self._forget({row.request for row in waiting})
                n_ended = 0
            ids, n_more = choice.from_states(slots.hidden, active)
            n_ended += n_more
            if n_ended < len(active):
                slots = self._decode(slots, ids)

    def _decode(self, slots: _Slots, ids: Tensor) -> _Slots:
        """Append the chosen tokens [S] to the rows, also to those that have ended."""
        if self.graphs is not None and self.graphs.works:
            return slots._replace(hidden=self.graphs(slots, ids))
        mask = None  # attention is faster without one
        if slots.is_padded:
            mask = torch.arange(slots.columns + 1, device=self.device) >= slots.starts[:, None]  # [S, columns]
            mask = mask[:, None, None] if self.makes_masks else mask.long()
        # Rows that have ended must not pass the positions at which some rotary frequencies change for all rows.
        positions = (slots.columns - slots.starts).clamp_(max=self.max_position)[:, None]  # [S, 1]
        hidden = forward(self.decoder, {"input_ids": ids[:, None]}, mask, positions, slots.cache)  # [S, 1, H]
        return slots._replace(hidden=hidden[:, -1])

    # ------------------------------------------------------------------------------------------ rows in and out

    def _rebuild(self, slots: _Slots | None, active: list[Row], new: list[Row]) -> tuple[_Slots, list[Row]]:
        """Return the rows that have not ended, and after them new rows, in as few columns as they need."""
        parts = []  # (rows, their indices)
        if kept := [i for i, row in enumerate(active) if not row.done]:
            parts.append((slots, kept))
        parts += self._prompts_of(new)
        return _concatenate(parts, self._new_cache()), [active[i] for i in kept] + new

    def _exchange(self, slots: _Slots, active: list[Row], new: list[Row]) -> tuple[_Slots, list[Row]]:
        """Put new rows where others ended, and rows from the end of the batch into the rest; the others stay."""
        n_rows = len(new) + sum(not row.done for row in active)
        free = iter([i for i, row in enumerate(active) if row.done])
        moved = [i for i in range(n_rows, len(active)) if not active[i].done]
        rows = iter(new + [active[i] for i in moved])
        active, hidden, starts = list(active), slots.hidden.clone(), slots.starts.clone()  # [S, H], [S]
        for source, sources in (*self._prompts_of(new), (slots, moved)):
            targets = list(itertools.islice(free, len(sources)))
            into, indices = (torch.tensor(i, dtype=torch.int64, device=self.device) for i in (targets, sources))
            for layer, other in zip(slots.layers, source.layers, strict=True):
                layer.put(into, other, indices)
            starts[into] = source.starts[indices] + slots.columns - source.columns
            hidden[into] = source.hidden[indices]
            for i in targets:
                active[i] = next(rows)
        for layer in slots.layers:
            layer.keys, layer.values = layer.keys[:n_rows], layer.values[:n_rows]
        starts = starts[:n_rows]
        return _Slots(slots.cache, starts, hidden[:n_rows], bool(starts.any())), active[:n_rows]

    def _prompts_of(self, rows: list[Row]) -> list[tuple[_Slots, list[int]]]:
        """Return the prompts of rows as (batch of prompts, indices) of neighbors from the same batch."""
        found = [self.computed[row.request] for row in rows]
        by_batch = (list(same) for _, same in itertools.groupby(found, lambda prompt: id(prompt[0])))
        return [(same[0][0], [index for _, index in same]) for same in by_batch]

    def _is_full(self, slots: _Slots) -> bool:
        """Return whether all columns are in use."""
        return slots.columns >= self.max_columns or any(layer.n == layer.keys.shape[2] for layer in slots.layers)

    def _have_space(self, slots: _Slots, new: list[Row]) -> bool:
        """Return whether new rows fit into the columns, and one more column does."""
        return not self._is_full(slots) and all(self.computed[row.request][0].columns <= slots.columns for row in new)

    def _forget(self, waiting: set[int]) -> None:
        """Drop the prompts of which no response waits."""
        self.computed = {request: prompt for request, prompt in self.computed.items() if request in waiting}

    def _compute_prompts(self, rows: Sequence[Row], next_rows: Iterable[Row]) -> None:
        """Compute the prompts of rows, and those of the next rows with them, in batches of similar lengths."""
        if all(row.request in self.computed for row in rows):
            return
        missing = [i for i in dict.fromkeys(row.request for row in (*rows, *next_rows)) if i not in self.computed]
        while missing:
            length = len(self.prompts[missing[0]])
            n = max(1, PREFILL_TOKENS // length)
            if self.policy.has_soft_prompt:  # virtual tokens come before the padding
                n = min(n, sum(len(self.prompts[i]) == length for i in missing))
            chosen, missing = missing[:n], missing[n:]
            prompts = self._prefill([self.prompts[i] for i in chosen])
            self.computed |= {request: (prompts, index) for index, request in enumerate(chosen)}

    def _prefill(self, prompts: list[list[int]]) -> _Slots:
        """Return the rows of prompts, the longest first."""
        width = len(prompts[0])
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)  # [P]
        padded = [[prompt[0]] * (width - len(prompt)) + prompt for prompt in prompts]
        inputs, cache = {"input_ids": torch.tensor(padded, device=self.device)}, self._new_cache()  # [P, W]
        starts, n_before, width_before = width - lengths, 0, 0  # [P]
        if self.policy.has_soft_prompt:
            model = self.policy.model
            prompt = model.soft_prompt
            inputs = prompt(inputs["input_ids"], model.get_input_embeddings(), model.dtype, fixed=False)
            n_before, width_before = prompt.n_tokens, prompt.n_before
            for i, layer in enumerate(getattr(inputs.pop("past_key_values", None), "layers", ())):
                cache.layers[i].update(layer.keys, layer.values)
        columns = torch.arange(n_before + width, device=self.device)  # [n + W]
        is_padded = len(prompts[-1]) < width
        mask = columns >= starts[:, None] if is_padded else None  # [P, n + W]
        positions = (columns - starts[:, None]).clamp(min=0)[:, n_before - width_before :]
        mask = None if mask is None else mask.long()
        hidden = forward(self.decoder, inputs, mask, positions, cache)  # [P, W, H]
        return _Slots(cache, starts, hidden[:, -1], is_padded)

    def _new_cache(self) -> Cache:
        layers = DynamicCache(config=self.policy.model.config).layers
        return Cache(layers=[layer if type(layer) is DummyLayer else _Columns() for layer in layers])


def _concatenate(parts: list[tuple[_Slots, list[int]]], cache: Cache) -> _Slots:
    """Return the chosen rows of several batches in one, with space for more columns."""
    chosen = [(part, torch.tensor(indices, device=part.starts.device)) for part, indices in parts]
    lengths = torch.cat([part.columns - part.starts[indices] for part, indices in chosen])  # [S]
    width = int(lengths.max())
    capacity = width + BLOCK * (1 + width // (4 * BLOCK))
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, _Columns):
            sources = [(part.cache.layers[number], indices) for part, indices in chosen]
            if sources[0][0].is_initialized:  # a layer can use the keys of another one
                layer.fill(sources, width, capacity)
    hidden = torch.cat([part.hidden[indices] for part, indices in chosen])  # [S, H]
    return _Slots(cache, width - lengths, hidden, int(lengths.min()) < width)
