"""Make the documents of a round from its answers, as the loss's kind of examples requires."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from minitrain.config.sections import RolloutConfig
from minitrain.data.cache import TokenCache
from minitrain.data.mismatched import choose_partners

EQUAL = 1e-6  # rewards of a group that differ by less are equal


@dataclass
class JudgedAnswer:
    """An answer with its reward.

    Attributes:
        prompt: Token ids of the prompt.
        ids: Token ids after the prompt.
        mask: Which of them were sampled.
        logps: Their log-probabilities when they were sampled.
        reward: NaN if it could not be judged.
        ended: Whether it ended by itself.
        token_rewards: The part of the reward that belongs to each token (default: 0).
    """

    prompt: list[int]
    ids: list[int]
    mask: list[bool]
    logps: list[float]
    reward: float
    ended: bool
    token_rewards: list[float] = field(default_factory=list)

    def __post_init__(self):
        self.token_rewards = self.token_rewards or [0.0] * len(self.ids)


@dataclass
class Document:
    """A document of an example."""

    answer: JudgedAnswer
    doc_features: dict[str, float] = field(default_factory=dict)


def judged(group: Sequence[JudgedAnswer]) -> list[JudgedAnswer]:
    """Return the answers that have a reward."""
    return [answer for answer in group if not math.isnan(answer.reward)]


def has_zero_variance(group: Sequence[JudgedAnswer]) -> bool:
    """Return whether all rewards of a group are equal, so that it has no gradient."""
    rewards = [answer.reward for answer in judged(group)]
    return len(rewards) < 2 or max(rewards) - min(rewards) < EQUAL


def rollouts(group: Sequence[JudgedAnswer], number: int) -> list[Document]:
    """Return all answers, with their rewards."""
    answers = judged(group)
    return [Document(answer, {"reward": answer.reward, "group": float(number)}) for answer in answers]


def preference(group: Sequence[JudgedAnswer]) -> list[Document]:
    """Return the best and the worst answer; nothing if their rewards are equal."""
    if has_zero_variance(group):
        return []
    ordered = sorted(judged(group), key=lambda answer: answer.reward)
    return [Document(answer, {"margin": 0.0}) for answer in (ordered[-1], ordered[0])]


def best(group: Sequence[JudgedAnswer], min_reward: float | None) -> list[Document]:
    """Return the answers with the highest reward, if it is above `min_reward`."""
    answers = judged(group)
    highest = max((answer.reward for answer in answers), default=-math.inf)
    if not answers or (min_reward is not None and highest <= min_reward):
        return []
    return [Document(answer) for answer in answers if highest - answer.reward < EQUAL]


def unpaired(groups: Sequence[Sequence[JudgedAnswer]]) -> list[list[Document]]:
    """Return each answer, desirable if its reward is above 0, before the answer to another prompt after its prompt."""
    kept = [judged(group) for group in groups]
    flat = [(number, answer) for number, group in enumerate(kept) for answer in group]
    partners = choose_partners(np.array([float(number) for number, _ in flat])) if flat else None
    examples: list[list[Document]] = [[] for _ in groups]
    for i, (number, answer) in enumerate(flat if partners is not None else []):
        other = flat[partners[i]][1]
        mismatched = JudgedAnswer(
            answer.prompt, other.ids, other.mask, other.logps, 0.0, other.ended, other.token_rewards
        )
        desirable = float(answer.reward > 0)
        examples[number] += [Document(one, {"desirable": desirable}) for one in (answer, mismatched)]
    return examples


def make_examples(
    groups: Sequence[Sequence[JudgedAnswer]], kind: str, options: RolloutConfig, all_answers: bool
) -> list[list[Document]]:
    """Return the documents of the example of each prompt; none if there is nothing to train on.

    Args:
        groups: The answers to each prompt.
        kind: The kind of the loss's examples.
        options: The options of rollouts.
        all_answers: conversation: train on all answers, as a distillation loss does.
    """
    if kind == "rollout":
        examples = [rollouts(group, number) for number, group in enumerate(groups)]
        if options.zero_variance_groups == "keep":
            return examples
        return [[] if has_zero_variance(group) else example for group, example in zip(groups, examples, strict=True)]
    if kind == "preference":
        return [preference(group) for group in groups]
    if kind == "unpaired_preference":
        return unpaired(groups)
    if all_answers:
        return [[Document(answer) for answer in group] for group in groups]
    return [best(group, options.min_reward) for group in groups]


def as_cache(examples: Sequence[Sequence[Document]], source: str, path: Path) -> TokenCache:
    """Return a token cache of the examples that have documents. Documents of an example share its prompt."""
    examples = [example for example in examples if example]
    documents = [document for example in examples for document in example]
    ids, mask, logps, token_rewards, shared = [], [], [], [], []
    for example in examples:
        for number, document in enumerate(example):
            answer = document.answer
            n = len(answer.prompt)
            ids += answer.prompt + answer.ids
            mask += [False] * n + answer.mask
            logps += [0.0] * n + answer.logps
            token_rewards += [0.0] * n + answer.token_rewards
            shared.append(n if number and answer.prompt == example[0].answer.prompt else 0)
    sizes = [len(document.answer.prompt) + len(document.answer.ids) for document in documents]
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "mask": torch.tensor(mask, dtype=torch.uint8),
        "offsets": torch.tensor(np.cumsum([0, *sizes])),
        "lines": torch.arange(len(examples)),
        "first_documents": torch.tensor(np.cumsum([0, *map(len, examples)])),
        "shared": torch.tensor(shared, dtype=torch.int32),
        "token_features/sample_logps": torch.tensor(logps, dtype=torch.float32),
        "doc_features/ended": torch.tensor([float(d.answer.ended) for d in documents], dtype=torch.float64),
    }
    if any(token_rewards):
        tensors["token_features/token_rewards"] = torch.tensor(token_rewards, dtype=torch.float32)
    for name in documents[0].doc_features:
        values = [document.doc_features[name] for document in documents]
        tensors[f"doc_features/{name}"] = torch.tensor(values, dtype=torch.float64)
    return TokenCache(tensors, {}, [], source, path)


def tensors_of(cache: TokenCache) -> dict[str, torch.Tensor]:
    """Return the tensors of a cache, as `TokenCache` takes them."""
    arrays = {name: getattr(cache, name) for name in ("offsets", "lines", "shared", "first_documents")}
    arrays |= {f"doc_features/{name}": values for name, values in cache.doc_features.items()}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    tensors |= {"ids": cache.ids, "mask": cache.mask}
    return tensors | {f"token_features/{name}": values.contiguous() for name, values in cache.token_features.items()}
