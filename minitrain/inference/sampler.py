"""Sample responses with a decode loop: each prompt is computed once, and responses that end leave the batch.

All rows of the batch write their next key and value in the same column. So rows are aligned on the right: a row of n
tokens occupies the last n columns, and its attention mask hides the others. A response that waits takes the row of one
that ended, with the keys and values of its prompt in front of the current column.

Each token is chosen by one random number, which depends only on the key of the response and on the position. So a
response does not depend on the others in its batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
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
from minitrain.model.logprobs import logits_dtype, logits_of, matmul_dtype_of, products_in
from minitrain.model.policy import Policy

PREFILL_TOKENS = 1 << 14  # tokens of the prompts that are computed at once
REFILL_FRACTION = 8  # the batch is rebuilt when an eighth of its rows has ended
BLOCK = 64  # random numbers and columns are allocated in blocks


class Request(NamedTuple):
    """A prompt and the keys of the responses to sample for it.

    Attributes:
        prompt: Token ids.
        keys: For each response, the integers that determine its random numbers.
        limit: Maximum number of tokens of a response.
    """

    prompt: list[int]
    keys: list[tuple[int, ...]]
    limit: int


@dataclass
class Sample:
    """A sampled response.

    Attributes:
        ids: Its token ids, with the end token.
        logps: Their log-probabilities at the sampling temperature, in the full distribution.
        ended: Whether it ended by itself, not by the limit of tokens.
    """

    ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: bool = False


class Chooser(NamedTuple):
    """How a token is chosen from logits; see `Sampling`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Return token ids [S] and their log-probabilities [S] for logits [S, V] and random numbers [S] below 1."""
        if self.temperature == 0:
            logps, ids = logits.log_softmax(-1).max(-1)
            return ids, logps
        logps = (logits / self.temperature).log_softmax(-1)  # [S, V]
        cumulated = self._kept(logps.exp()).cumsum(-1, dtype=torch.float64)  # [S, V]
        ids = torch.searchsorted(cumulated, (uniforms * cumulated[:, -1])[:, None], right=True)  # [S, 1]
        ids = ids.clamp(max=logits.shape[-1] - 1)
        return ids[:, 0], logps.gather(1, ids)[:, 0]

    def _kept(self, probs: Tensor) -> Tensor:
        """Set the probabilities [S, V] outside of top_k and top_p to 0."""
        if self.top_k and self.top_k < probs.shape[-1]:
            probs = probs.where(probs >= probs.topk(self.top_k).values[:, -1:], 0.0)
        if self.top_p < 1:
            ordered = probs.sort(descending=True).values  # [S, V]
            before = ordered.cumsum(-1) - ordered  # [S, V]
            least = ordered.where(before < self.top_p * ordered.sum(-1, keepdim=True), 2.0).amin(-1, keepdim=True)
            probs = probs.where(probs >= least, 0.0)
        return probs


class Uniforms:
    """Random numbers in [0, 1) of one response, one per position."""

    def __init__(self, key: Sequence[int]):
        self.generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))
        self.values = np.empty(0)

    def __getitem__(self, position: int) -> float:
        while position >= len(self.values):
            self.values = np.concatenate([self.values, self.generator.random(BLOCK)])
        return self.values[position]


@dataclass
class _Row:
    """A response that is being sampled."""

    request: int
    sample: Sample
    uniforms: Uniforms
    limit: int
    n_tokens: int  # of the prompt and the response so far, with virtual tokens
    done: bool = False


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
                space[row : row + len(indices), :, width - used : width] = tensor[indices, :, n - used : n]
                row += len(indices)
            return space

        keys, values = joined("keys"), joined("values")
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.n = keys, values, width

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

    @property
    def columns(self) -> int:
        return self.cache.get_seq_length()

    @property
    def is_full(self) -> bool:
        return any(isinstance(layer, _Columns) and layer.n == layer.keys.shape[2] for layer in self.cache.layers)


class Sampler:
    """Samples responses from a policy, which must be in eval mode, without gradients.

    Args:
        policy: The policy.
        end_ids: Tokens that end a response.
        n_slots: Maximum number of rows of a batch. It changes no response.
    """

    def __init__(self, policy: Policy, end_ids: Sequence[int], n_slots: int = 64):
        self.policy, self.end_ids, self.n_slots = policy, set(end_ids), n_slots
        self.device = policy.model.get_input_embeddings().weight.device

    @staticmethod
    def supports(policy: Policy) -> bool:
        """Return whether all layers of a model keep plain keys and values, so that rows can be exchanged."""
        kinds = {DynamicLayer, DynamicSlidingWindowLayer, DummyLayer}
        return all(type(layer) in kinds for layer in DynamicCache(config=policy.model.config).layers)

    def sample(
        self,
        requests: Sequence[Request],
        choose: Chooser,
        is_stopped: Callable[[list[int]], bool] | None = None,
    ) -> list[list[Sample]]:
        """Return the responses to each request, in the order of its keys.

        Args:
            requests: The prompts.
            choose: Chooses the tokens.
            is_stopped: Called with the ids of a response so far; True ends it.
        """
        self.requests, self.head = requests, _Head(self.policy)
        self.computed: dict[int, tuple[_Slots, int]] = {}  # request -> its prompt, while some of its responses wait
        n_before = self.policy.model.soft_prompt.n_tokens if self.policy.has_soft_prompt else 0
        rows = [
            [_Row(i, Sample(), Uniforms(key), request.limit, len(request.prompt) + n_before) for key in request.keys]
            for i, request in enumerate(requests)
        ]
        longest_first = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt))
        waiting = deque(row for i in longest_first for row in rows[i])
        active: list[_Row] = []
        slots = None
        while waiting or not all(row.done for row in active):
            n_ended = sum(row.done for row in active)
            free = self.n_slots - len(active) + n_ended
            has_news = n_ended * REFILL_FRACTION > len(active) or (waiting and free * REFILL_FRACTION >= self.n_slots)
            if slots is None or has_news or slots.is_full:
                new = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                slots = self._rebuild(slots, active, new)
                active = [row for row in active if not row.done] + new
                self._forget({row.request for row in waiting})
            ids = self._choose(slots, active, choose, is_stopped)
            if not all(row.done for row in active):
                slots = self._decode(slots, active, ids)
        return [[row.sample for row in of_request] for of_request in rows]

    def _choose(self, slots: _Slots, active: list[_Row], choose: Chooser, is_stopped) -> Tensor:
        """Choose the next token of each row, and return the ids [S]."""
        values = [row.uniforms[len(row.sample.ids)] for row in active] if choose.temperature else [0.0] * len(active)
        uniforms = torch.tensor(values, dtype=torch.float64, device=self.device)  # [S]
        ids, logps = choose(self.head(slots.hidden), uniforms)
        for row, token, logp in zip(active, ids.tolist(), logps.tolist(), strict=True):
            if row.done:
                continue
            sample = row.sample
            sample.ids.append(token)
            sample.logps.append(logp)
            sample.ended = token in self.end_ids or (is_stopped is not None and is_stopped(sample.ids))
            row.done = sample.ended or len(sample.ids) >= row.limit
        return ids

    def _decode(self, slots: _Slots, active: list[_Row], ids: Tensor) -> _Slots:
        """Append the chosen tokens [S] to the rows. Those that have ended repeat their last position."""
        columns = torch.arange(slots.columns + 1, device=self.device)
        mask = columns >= slots.starts[:, None]  # [S, columns]
        positions = torch.tensor([[row.n_tokens] for row in active], device=self.device)  # [S, 1]
        for row in active:
            row.n_tokens += not row.done
        hidden = self._forward({"input_ids": ids[:, None]}, mask, positions, slots.cache)  # [S, 1, H]
        return slots._replace(hidden=hidden[:, -1])

    def _forward(self, inputs: dict, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        outputs = decoder_of(self.policy.model)(
            **inputs,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )
        return outputs.last_hidden_state

    # ------------------------------------------------------------------------------------------ rows in and out

    def _rebuild(self, slots: _Slots | None, active: list[_Row], new: list[_Row]) -> _Slots:
        """Return the rows that have not ended, and after them new rows, in as few columns as they need."""
        self._compute_prompts(dict.fromkeys(row.request for row in new))
        parts = []  # (rows, their indices)
        if kept := [i for i, row in enumerate(active) if not row.done]:
            parts.append((slots, kept))
        for row in new:
            source, index = self.computed[row.request]
            if parts and parts[-1][0] is source:
                parts[-1][1].append(index)
            else:
                parts.append((source, [index]))
        return _concatenate(parts, self._new_cache())

    def _forget(self, waiting: set[int]) -> None:
        """Drop the prompts of which no response waits."""
        self.computed = {request: prompt for request, prompt in self.computed.items() if request in waiting}

    def _compute_prompts(self, requests: Iterable[int]) -> None:
        """Compute the prompts that are not computed yet, in batches of similar lengths."""
        missing = [i for i in requests if i not in self.computed]
        while missing:
            length = len(self.requests[missing[0]].prompt)
            n = max(1, PREFILL_TOKENS // length)
            if self.policy.has_soft_prompt:  # virtual tokens come before the padding
                n = min(n, sum(len(self.requests[i].prompt) == length for i in missing))
            chosen, missing = missing[:n], missing[n:]
            prompts = self._prefill([self.requests[i].prompt for i in chosen])
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
        mask = columns >= starts[:, None]  # [P, n + W]
        positions = (columns - starts[:, None]).clamp(min=0)[:, n_before - width_before :]
        hidden = self._forward(inputs, mask, positions, cache)  # [P, W, H]
        return _Slots(cache, starts, hidden[:, -1])

    def _new_cache(self) -> Cache:
        layers = DynamicCache(config=self.policy.model.config).layers
        return Cache(layers=[layer if type(layer) is DummyLayer else _Columns() for layer in layers])


class _Head:
    """Computes logits as in training, with the matrix of the LM head converted once."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.matrix: Tensor | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [S, H] in float32, shape [S, V]."""
        states, layer = self.policy.lm_head(hidden)
        dtype = logits_dtype(matmul_dtype_of(states), states.device.type)
        if self.matrix is None:
            self.matrix = layer.matrix(dtype)  # [V, H]
        buffer = states.new_empty(len(states), len(self.matrix), dtype=torch.float32)
        with torch.autocast(states.device.type, enabled=False), products_in(dtype):
            return logits_of(states, self.matrix, layer.bias, layer, False, buffer)[0]


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
    return _Slots(cache, width - lengths, torch.cat([part.hidden[indices] for part, indices in chosen]))
