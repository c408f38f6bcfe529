"""Requests to a sampler, and the choice of the next token of each response."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minitrain.model.logprobs import logits_dtype, logits_of, matmul_dtype_of, products_in
from minitrain.model.policy import Policy

BLOCK = 64  # random numbers are drawn in blocks
VOCABULARY_BLOCK = 512  # tokens whose probabilities are summed at once, in a large vocabulary
LARGE_VOCABULARY = 4096
IsStopped = Callable[[list[int]], bool]  # ids of a response so far -> whether it ends here


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
        """Return token ids [S] and their log-probabilities [S] for logits [S, V] and random numbers [S] below 1.

        It can overwrite the logits.
        """
        if self.temperature == 0:
            largest, ids = logits.max(-1)
            return ids, largest - logits.logsumexp(-1)
        if logits.shape[-1] >= LARGE_VOCABULARY:
            return self._choose_by_blocks(logits, uniforms)
        logps = (logits / self.temperature).log_softmax(-1)  # [S, V]
        cumulated = self._kept(logps.exp()).cumsum(-1, dtype=torch.float64)  # [S, V]
        ids = torch.searchsorted(cumulated, (uniforms * cumulated[:, -1])[:, None], right=True)  # [S, 1]
        ids = ids.clamp(max=logits.shape[-1] - 1)
        return ids[:, 0], logps.gather(1, ids)[:, 0]

    def _choose_by_blocks(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a block of tokens by sums in float32, then a token in it.

        Sums of all tokens in float64 would take most of the time of a step.
        """
        logits.sub_(logits.amax(-1, keepdim=True))
        if self.temperature != 1:
            logits /= self.temperature
        weights = logits.exp_()  # [S, V]
        log_total = _block_sums(weights).sum(-1, dtype=torch.float64).log()  # [S]
        weights = self._kept(weights)
        sums = _block_sums(weights).double()  # [S, blocks]
        cumulated = sums.cumsum(-1)  # [S, blocks]
        thresholds = uniforms[:, None] * cumulated[:, -1:]  # [S, 1]
        block = torch.searchsorted(cumulated, thresholds, right=True).clamp(max=sums.shape[1] - 1)  # [S, 1]
        own = sums.gather(1, block)  # [S, 1]
        fraction = ((thresholds - cumulated.gather(1, block) + own) / own).clamp(0, 1 - 1e-12)  # [S, 1] in the block
        columns = block * VOCABULARY_BLOCK + torch.arange(VOCABULARY_BLOCK, device=block.device)  # [S, 512]
        last = weights.shape[1] - 1
        of_block = weights.gather(1, columns.clamp(max=last)).where(columns <= last, 0.0)  # [S, 512]
        cumulated = of_block.cumsum(-1, dtype=torch.float64)  # [S, 512]
        ids = torch.searchsorted(cumulated, fraction * cumulated[:, -1:], right=True)  # [S, 1]
        ids = (block * VOCABULARY_BLOCK + ids).clamp(max=last)
        return ids[:, 0], (weights.gather(1, ids)[:, 0].log() - log_total).float()

    def _kept(self, probs: Tensor) -> Tensor:
        """Set the probabilities [S, V] outside of top_k and top_p to 0. They can have any sum."""
        if self.top_k and self.top_k < probs.shape[-1]:
            probs = probs.where(probs >= probs.topk(self.top_k).values[:, -1:], 0.0)
        if self.top_p < 1:
            ordered = probs.sort(descending=True).values  # [S, V]
            before = ordered.cumsum(-1) - ordered  # [S, V]
            least = ordered.where(before < self.top_p * ordered.sum(-1, keepdim=True), 2.0).amin(-1, keepdim=True)
            probs = probs.where(probs >= least, 0.0)
        return probs


def _block_sums(weights: Tensor) -> Tensor:
    """Return the sums of blocks of `VOCABULARY_BLOCK` columns; the last block can be shorter."""
    n = weights.shape[1] - weights.shape[1] % VOCABULARY_BLOCK
    sums = weights[:, :n].unflatten(1, (-1, VOCABULARY_BLOCK)).sum(-1)  # [S, full blocks]
    return torch.cat([sums, weights[:, n:].sum(-1, keepdim=True)], 1)


def uniforms_of(key: Sequence[int]) -> Iterator[float]:
    """Yield the random numbers in [0, 1) of one response, one per position."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(list(key))))
    while True:
        yield from generator.random(BLOCK).tolist()


@dataclass
class Row:
    """A response that is being sampled.

    Attributes:
        request: Index of its request.
        prompt: Token ids of the prompt.
        uniforms: Random numbers of its next tokens; None for greedy decoding.
        limit: Maximum number of its tokens.
        sample: Its tokens so far.
        done: Whether it needs no more tokens.
    """

    request: int
    prompt: list[int]
    uniforms: Iterator[float] | None
    limit: int
    sample: Sample = field(default_factory=Sample)
    done: bool = False


class TokenChoice:
    """Chooses the next token of rows, and ends them.

    Args:
        policy: The policy, whose LM head computes the logits.
        choose: Chooses tokens from logits.
        end_ids: Tokens that end a response.
        is_stopped: Called with the ids of a response after each of its tokens; True ends it.
        on_step: Called after each step with the number of rows that have ended in it.
    """

    def __init__(
        self,
        policy: Policy,
        choose: Chooser,
        end_ids: set[int],
        is_stopped: IsStopped | None = None,
        on_step: Callable[[int], None] | None = None,
    ):
        self.choose, self.end_ids, self.is_stopped, self.on_step = choose, end_ids, is_stopped, on_step
        self.head = Head(policy)

    def rows(self, requests: Sequence[Request]) -> list[list[Row]]:
        """Return the rows of each request."""
        needs_uniforms = self.choose.temperature > 0
        return [
            [
                Row(i, request.prompt, uniforms_of(key) if needs_uniforms else None, request.limit)
                for key in request.keys
            ]
            for i, request in enumerate(requests)
        ]

    def from_states(self, hidden: Tensor, rows: Sequence[Row]) -> tuple[Tensor, int]:
        """Choose the next tokens by hidden states [S, H]; see `from_logits`."""
        return self.from_logits(self.head(hidden), rows)

    def from_logits(self, logits: Tensor, rows: Sequence[Row]) -> tuple[Tensor, int]:
        """Choose the next token of each row by logits [S, V].

        Returns:
            The ids [S], unused for rows that were done, and the number of rows that have ended in this step.
        """
        values = [0.0 if row.done or row.uniforms is None else next(row.uniforms) for row in rows]
        ids, logps = self.choose(logits, torch.tensor(values, dtype=torch.float64).to(logits.device))
        n_ended, end_ids, is_stopped = 0, self.end_ids, self.is_stopped
        for row, token, logp in zip(rows, ids.tolist(), logps.tolist(), strict=True):
            if row.done:
                continue
            sample = row.sample
            sample.ids.append(token)
            sample.logps.append(logp)
            if token in end_ids or (is_stopped is not None and is_stopped(sample.ids)):
                sample.ended = row.done = True
            elif len(sample.ids) >= row.limit:
                row.done = True
            n_ended += row.done
        if self.on_step is not None:
            self.on_step(n_ended)
        return ids, n_ended


class Head:
    """Computes logits as in training, with the matrix of the LM head converted once, always in the same memory."""

    def __init__(self, policy: Policy):
        self.policy = policy
        self.matrix: Tensor | None = None
        self.buffer: Tensor | None = None  # [S, V]

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states [S, H] in float32, shape [S, V]."""
        states, layer = self.policy.lm_head(hidden)
        if self.matrix is None:
            self.matrix = layer.matrix(logits_dtype(matmul_dtype_of(states), states.device.type))  # [V, H]
        if self.buffer is None or len(self.buffer) < len(states):
            self.buffer = None  # frees it
            self.buffer = states.new_empty(len(states), len(self.matrix), dtype=torch.float32)
        with torch.autocast(states.device.type, enabled=False), products_in(self.matrix.dtype):
            return logits_of(states, self.matrix, layer.bias, layer, False, self.buffer[: len(states)])[0]


def stopping(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> IsStopped | None:
    """Return a function that tells whether a response has one of the strings at its end."""
    if not strings:
        return None
    longest = max(map(len, strings)) + 8  # tokens have at least one character, but for some special ones
    return lambda ids: any(string in tokenizer.decode(ids[-longest:]) for string in strings)
