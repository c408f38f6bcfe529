"""Made-up examples of each kind of record, and all that a loss needs to be called on them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from minitrain.batch import TARGET_WEIGHTS, Batch, Document, collate
from minitrain.distributed.parallel import SingleDevice
from minitrain.losses import Loss, Models, add_features
from minitrain.model import attention
from minitrain.model.policy import Policy
from minitrain.model.sequence_head import make_policy
from minitrain.model.tiny import tiny_scorer
from minitrain.training.step import share_step_rows, share_step_statistics
from tests.conftest import random_llama

LENGTHS = (9, 3, 14, 5, 30, 2, 7, 11)  # of which 1 to 27 tokens are learned
N = len(LENGTHS)


def document(length: int, generator: torch.Generator, prompt: torch.Tensor | None = None) -> Document:
    ids = torch.randint(3, 259, (length,), generator=generator, dtype=torch.int32)
    n_prompt = max(1, length // 4)
    if prompt is not None:
        ids, n_prompt = torch.cat([prompt, ids[1:]]), len(prompt)
    mask = torch.ones(len(ids), dtype=torch.uint8)
    mask[:n_prompt] = 0
    return Document(ids, mask)


def examples(kind: str) -> list[list[Document]]:
    """Eight examples of very different lengths, each a list of documents."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, length in enumerate(LENGTHS):
        first = document(length, generator)
        found = [first]
        if kind in ("retrieval", "ranking"):  # the query, its positive and up to two negatives; one positive is two's
            found = [document(LENGTHS[(i + j) % N], generator) for j in range(2 + (kind == "ranking") + i % 3)]
            found = [replace(each, mask=torch.zeros_like(each.mask)) for each in found]
            for j, each in enumerate(found):
                role = min(j if kind == "retrieval" else j + 1, 2)
                each.doc_features = {"role": float(role), "text": float(10 * (i % 7) + j), "query": float(i % 6)}
            made.append(found)
            continue
        if kind in ("preference", "unpaired_preference"):
            n_prompt = int(first.mask.argmax())
            found.append(document(LENGTHS[-i], generator, first.ids[:n_prompt]))
            found[1].shared = n_prompt
        for each in found:
            each.doc_features, each.token_features = numbers(kind, i, each, generator)
        made.append(found)
    return made


def numbers(kind: str, i: int, document: Document, generator: torch.Generator) -> tuple[dict, dict]:
    """Values and columns that documents of a kind have."""
    if kind == "preference":
        return {"margin": 0.1 * i}, {}
    if kind == "unpaired_preference":
        return {"desirable": float(i % 3 > 0)}, {}
    if kind == "solution":
        return {}, {"step_label": (torch.rand(len(document.ids), generator=generator) > 0.4).float()}
    if kind == "rollout":
        return {"reward": float(i * 7 % 5) - 1, "group": float(i // 3)}, _of_tokens(document, generator)
    if kind == "classification":
        return {"label": float(i % 3)}, {"token_types": torch.zeros(len(document.ids))}
    return {}, {}


def _of_tokens(document: Document, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A rollout's columns. Its prompt has numbers too, which must not matter."""
    n = len(document.ids)
    made = {name: torch.randn(n, generator=generator) for name in ("values", "advantages", "returns")}
    made["old_logps"] = -5 + torch.randn(n, generator=generator)
    made["ref_logps"] = made["old_logps"] + 0.5 * torch.randn(n, generator=generator)
    return made


def collated(made: list[list[Document]], rows: list[list[int]], packed: bool = False, shared: bool = False) -> Batch:
    """Rows of examples as a batch: packed, or each document in a row of its own; with prompts shared or repeated."""
    if not shared:
        made = [[Document(d.ids, d.mask, 0, d.doc_features, d.token_features) for d in example] for example in made]
    laid = [[document for i in row for document in made[i]] for row in rows]
    if not packed:
        laid = [[document] for row in laid for document in row]
    return collate(laid, pad_token_id=0)


def files(made: list[list[Document]]) -> list[SimpleNamespace]:
    """The examples as a data file, to prepare a loss with."""
    documents = [document for example in made for document in example]
    values = {name: np.array([d.doc_features[name] for d in documents]) for name in documents[0].doc_features}
    columns = {name: torch.cat([d.token_features[name] for d in documents]) for name in documents[0].token_features}
    offsets = np.cumsum([0, *(len(d.ids) for d in documents)])
    mask = torch.cat([d.mask for d in documents])
    labels = sorted({str(int(number)) for number in values.get("label", [])})
    return [
        SimpleNamespace(
            source="x", doc_features=values, token_features=columns, offsets=offsets, mask=mask, labels=labels
        )
    ]


def prepared(loss: Loss, weighted: bool = False) -> list[list[Document]]:
    """The examples that a loss learns from, with what it adds to them, and with weights of their tokens."""
    made = examples(loss.example_type)
    if not loss.uses_partners:
        made = [example[:1] for example in made]
    if weighted:
        generator = torch.Generator().manual_seed(1)
        for document in (document for example in made for document in example):
            weights = torch.rand(len(document.ids), generator=generator) * 3
            document.token_features = {TARGET_WEIGHTS: weights * document.mask}
    (file,) = files(made)
    add_features(loss, [file])
    for number, document in enumerate(d for example in made for d in example):
        span = slice(file.offsets[number], file.offsets[number + 1])
        document.doc_features = {name: float(column[number]) for name, column in file.doc_features.items()}
        document.token_features = {name: column[span] for name, column in file.token_features.items()}
    return made


def policy_for(loss: Loss, seed: int = 0, implementation: str = "sdpa") -> Policy:
    """A random Llama with the ends that a loss needs."""
    model = random_llama(hidden_size=32)
    if loss.head_labels is not None:
        model = tiny_scorer(model, len(loss.head_labels), 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if seed:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    attention.register()
    model.set_attn_implementation(implementation)
    policy = make_policy(model)
    if "values" in loss.requires:
        policy.add_value_head()
        torch.nn.init.normal_(policy.value_head.weight, generator=generator)
    return policy


def models_for(loss: Loss, implementation: str = "sdpa") -> Models:
    """Return a policy and the other models that a loss requires, which have other weights than the policy."""
    others = {name: policy_for(loss, 1, implementation) for name in ("reference", "teacher") if name in loss.requires}
    return Models(
        policy_for(loss, 0, implementation), **{name: model.requires_grad_(False) for name, model in others.items()}
    )


def step(loss: Loss, batches: list[Batch], implementation: str = "sdpa", models: Models | None = None):
    """(loss value, gradients) of one optimizer step over micro-batches, as the trainer does it."""
    models = models or models_for(loss, implementation)
    models.policy.zero_grad()
    parallel = SingleDevice(torch.device("cpu"))
    weight = sum(loss.num_items(batch) for batch in batches)
    share_step_statistics(loss, batches, models, parallel)
    share_step_rows(loss, batches, models, parallel)
    value = 0.0
    for batch in batches:
        output = loss(batch, models)
        (output.loss_sum / weight).backward()
        value += output.loss_sum.item() / weight.item()
    return value, [p.grad for p in models.policy.parameters() if p.grad is not None]
