"""Exchange the answers of a round between ranks, as tensors."""

from collections.abc import Sequence

import numpy as np
import torch

from minitrain.distributed.parallel import SingleDevice

from .documents import JudgedAnswer

# The fields of `JudgedAnswer` besides its prompt, which the answers of a group share.
OF_TOKENS = {"ids": torch.int32, "mask": torch.bool, "logps": torch.float32, "token_rewards": torch.float32}
OF_ANSWERS = {"reward": torch.float64, "ended": torch.bool}


def gather_groups(groups: Sequence[Sequence[JudgedAnswer]], parallel: SingleDevice) -> list[list[JudgedAnswer]]:
    """Return the groups of all ranks, in rank order. All ranks must call it."""
    gathered = [parallel.gather_tensors(tensor) for tensor in _pack(groups)]
    return [group for of_rank in zip(*gathered, strict=True) for group in _unpack(*of_rank)]


def _pack(groups: Sequence[Sequence[JudgedAnswer]]) -> list[torch.Tensor]:
    """Return the sizes of groups, prompts and answers, the prompts, and each field, without borders."""
    answers = [answer for group in groups for answer in group]
    prompts = [group[0].prompt for group in groups]
    tensors = [torch.tensor(list(map(len, lists)), dtype=torch.int64) for lists in (groups, prompts)]
    tensors.append(torch.tensor([len(answer.ids) for answer in answers], dtype=torch.int64))
    tensors.append(torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int32))
    for name, dtype in OF_TOKENS.items():
        tensors.append(torch.tensor([value for one in answers for value in getattr(one, name)], dtype=dtype))
    for name, dtype in OF_ANSWERS.items():
        tensors.append(torch.tensor([getattr(one, name) for one in answers], dtype=dtype))
    return tensors


def _unpack(n_answers, n_prompt, n_tokens, prompts, *fields) -> list[list[JudgedAnswer]]:
    """Return the groups of `_pack`."""
    prompt_of = _split(prompts, n_prompt)
    of_tokens, of_answers = fields[: len(OF_TOKENS)], fields[len(OF_TOKENS) :]
    columns = [_split(values, n_tokens) for values in of_tokens] + [values.tolist() for values in of_answers]
    rows = (dict(zip((*OF_TOKENS, *OF_ANSWERS), row, strict=True)) for row in zip(*columns, strict=True))
    return [
        [JudgedAnswer(prompt=prompt, **next(rows)) for _ in range(n)]
        for n, prompt in zip(n_answers.tolist(), prompt_of, strict=True)
    ]


def _split(values: torch.Tensor, lengths: torch.Tensor) -> list[list]:
    """Return consecutive parts of these lengths."""
    ends = np.cumsum(lengths.numpy())
    flat = values.tolist()
    return [flat[end - n : end] for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)]
