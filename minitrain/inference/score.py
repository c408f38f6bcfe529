"""Classify texts, score responses and steps with a reward model, or embed texts: `minitrain score`."""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from minitrain.batch import Batch, Document, collate
from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, count_example, encode
from minitrain.data.examples import (
    ClassificationExample,
    Conversation,
    Example,
    assistant,
    row_formats_of,
    to_example,
    user,
)
from minitrain.data.files import FORMATS, check_is_file, format_of, read_rows
from minitrain.data.formats_scores import Solution
from minitrain.data.template import Template
from minitrain.errors import ConfigError, DataError
from minitrain.model.load import load_tokenizer, trained_outputs
from minitrain.model.load_check import check_policy
from minitrain.model.policy import Policy
from minitrain.model.positions import batches_by_length
from minitrain.model.sequence_head import MULTI_LABEL, make_policy

from .generate import load_saved, model_config
from .resolve import find_model


class ScoringRequest(NamedTuple):
    """An example to score, its location (for error messages) and its row."""

    where: str
    row: dict
    example: Example


class SequenceScorer:
    """A model with a sequence head, and its chat template.

    Attributes:
        labels: Names of the classes; None for a model that returns one number.
        multi_label: Whether a text has any number of labels.
        counts: What became of the examples, by the keys of `minitrain.data.counts`.
    """

    def __init__(self, policy: Policy, template: Template, max_length: int):
        self.policy, self.template = policy.eval(), template
        self.limits = TruncationConfig(max_length)
        config = policy.model.config
        self.counts: Counter[str] = Counter()
        self.labels = list(config.id2label.values()) if config.problem_type != "regression" else None
        self.multi_label = config.problem_type == MULTI_LABEL

    def predict(self, requests: list[ScoringRequest], batch_size: int = 16, progress: bool = False) -> list[dict]:
        """Return the new columns of each request, such as `prediction`. Raises DataError."""
        if isinstance(requests[0].example, Solution):
            rewards = self._run(requests, self._step_scores, batch_size, progress)
            return [{"prediction": steps.sigmoid().tolist()} for steps in rewards]
        return self.predictions(self.scores(requests, batch_size, progress))

    def scores(self, requests: list[ScoringRequest], batch_size: int = 16, progress: bool = False) -> torch.Tensor:
        """Return the outputs of the head in the order of the requests, shape [n, L] float32. Raises DataError."""
        return torch.stack(self._run(requests, lambda batch: self.policy(batch).scores.cpu(), batch_size, progress))

    def _run(
        self,
        requests: list[ScoringRequest],
        compute: Callable[[Batch], Iterable[torch.Tensor]],
        batch_size: int,
        progress: bool,
    ) -> list[torch.Tensor]:
        """Return what `compute` returns for the documents of a batch, in the order of the requests."""
        documents = [self._document(request) for request in requests]
        lengths = [len(document.ids) for document in documents]
        device = self.policy.model.get_input_embeddings().weight.device
        outputs = {}
        with (
            torch.no_grad(),
            tqdm(total=len(requests), unit=" texts", disable=None if progress else True, leave=False) as bar,
        ):
            for chosen in batches_by_length(lengths, batch_size, self.policy.rotary_limit):
                batch = collate([[documents[i]] for i in chosen], self.template.tokenizer.pad_token_id)
                outputs |= dict(zip(chosen, compute(batch.to(device)), strict=True))
                bar.update(len(chosen))
        return [outputs[i] for i in range(len(documents))]

    def _step_scores(self, batch: Batch) -> Iterable[torch.Tensor]:
        """Return the score of each step of the documents, [steps] each."""
        values = self.policy(batch, at_targets=True).values.cpu()  # [N]
        return values.split(torch.bincount(batch.target_docs.cpu(), minlength=batch.n_docs).tolist())

    def predictions(self, scores: torch.Tensor) -> list[dict]:
        """Return a `prediction` for each row of scores [n, L]: a label with its `probability`, or the number itself.

        With `multi_label`, the labels whose probability is above 1/2, and the `probabilities` of all.
        """
        if self.labels is None:
            return [{"prediction": number} for number in scores[:, 0].tolist()]
        if self.multi_label:
            each = [dict(zip(self.labels, row, strict=True)) for row in scores.sigmoid().tolist()]
            return [{"prediction": [name for name in row if row[name] > 0.5], "probabilities": row} for row in each]
        probabilities, chosen = scores.softmax(1).max(1)  # [n], [n]
        pairs = zip(chosen.tolist(), probabilities.tolist(), strict=True)
        return [{"prediction": self.labels[number], "probability": probability} for number, probability in pairs]

    def _document(self, request: ScoringRequest) -> Document:
        try:
            documents = encode(request.example, self.template, self.limits)
        except DataError as error:
            raise error.at(request.where) from None
        if isinstance(documents, str):
            message = (
                f"{request.where}: truncation to {self.limits.max_length} tokens leaves no response. Shorten the row."
            )
            raise DataError(message, "too-large")
        (tokens,) = documents
        self.counts += count_example(request.example, documents, self.template)
        columns = {name: torch.tensor(column) for name, column in tokens.token_features.items()}
        return Document(torch.tensor(tokens.ids), torch.tensor(tokens.mask), token_features=columns)


class Embedder(SequenceScorer):
    """A language model whose pooled hidden states are embeddings."""

    def __init__(self, policy: Policy, template: Template, max_length: int, pooling: str):
        super().__init__(policy, template, max_length)
        self.pooling = pooling

    def predict(self, requests: list[ScoringRequest], batch_size: int = 16, progress: bool = False) -> list[dict]:
        """Return the normalized `embedding` of each text, or the cosine similarity of each pair as `prediction`."""
        texts = [[r.example.text] + ([r.example.text_pair] if r.example.text_pair else []) for r in requests]
        singles = [
            request._replace(example=ClassificationExample(text, None, ""))
            for request, each in zip(requests, texts, strict=True)
            for text in each
        ]
        states = iter(self._run(singles, self._embed, batch_size, progress))
        found = [[next(states) for _ in each] for each in texts]
        return [
            {"prediction": float(each[0] @ each[1])} if len(each) == 2 else {"embedding": each[0].tolist()}
            for each in found
        ]

    def _embed(self, batch: Batch) -> torch.Tensor:
        """Return the embeddings of the documents, shape [D, H]."""
        return torch.nn.functional.normalize(self.policy(batch, pooling=self.pooling).embeddings, dim=1).cpu()


def read_pooling(folder: Path) -> str | None:
    """Return the pooling of an embedding model, as sentence-transformers saves it; None for another model."""
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    modes = json.loads(file.read_text())
    return "mean" if modes.get("pooling_mode_mean_tokens") else "last"


def load_scorer(
    source: str,
    requests: list[ScoringRequest],
    device: str = "auto",
    chat_template: str = "auto",
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> SequenceScorer:
    """Load a model with a sequence head, or one that embeds texts.

    Args:
        source: A run directory (its final/, or best/), a folder with a model or an adapter, or the name of a Hub model.
        requests: What it will score. Texts are tokenized without the chat template.
        device: "auto", or a PyTorch device.
        chat_template: "auto", the name of a template, or a path, as the option `chat_template`.
        trust_remote_code: Run the code of the model's repository.
        chat_template_kwargs: Arguments of the chat template instead of those of training.

    Raises:
        ConfigError: The folder does not exist, or the model has no sequence head.
    """
    found = find_model(source)
    config = model_config(found, trust_remote_code)
    labels, pooling = trained_outputs(config), read_pooling(Path(found))
    if labels is None and pooling is None:
        message = f"{source}: the model returns text, not scores. Use `minitrain generate`."
        raise ConfigError(message, "unsupported-model")
    tokenizer = load_tokenizer(config, scores=labels is not None)
    are_texts = all(isinstance(request.example, ClassificationExample) for request in requests)
    template = Template(tokenizer, "none" if are_texts else chat_template, variables=chat_template_kwargs)
    policy = make_policy(load_saved(config, tokenizer, device, labels))
    check_policy(policy, packing=False, device=policy.model.device)
    if pooling is None:
        return SequenceScorer(policy, template, policy.n_positions)
    if not are_texts:
        raise ConfigError(f"{source}: embeds texts, not conversations. Use --text or rows with a text.", "mismatch")
    return Embedder(policy, template, policy.n_positions, pooling)


def format_prediction(prediction: dict) -> str:
    """Return a prediction as a line of the console."""
    return "\t".join(map(_format_value, prediction.values()))


def _format_value(value: str | float | list | dict) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format_value(number)}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(map(_format_value, value)) or "-"  # no label
    return f"{value:.4f}" if isinstance(value, float) else value


def requests_from_args(arguments: Namespace, tools: list[dict] | None = None) -> list[ScoringRequest]:
    """Return the texts, pairs of texts, or prompts with responses of a command line, or of its file.

    Args:
        arguments: The command line.
        tools: Tools of conversations that have none.

    Raises:
        ConfigError: The arguments do not fit together.
        DataError: The file cannot be read, or a row is invalid.
    """
    given = vars(arguments)
    for second, first in (("text_pair", "text"), ("response", "prompt")):
        missing = second == "response" and given[first] and not given[second]
        if missing or (given[second] and len(given[second]) != len(given[first] or [])):
            counts = f"expected one per --{first} ({len(given[first] or [])}), got {len(given[second] or [])}"
            raise ConfigError(f"--{second.replace('_', '-')}: {counts}. Set all of them.", "usage")
    columns = dict(pair.partition("=")[::2] for pair in arguments.columns)
    if not all(columns.values()):
        raise ConfigError('--columns: expected NAME=COLUMN. Write, for example, text="#1 String".', "usage")
    if arguments.input:
        return _requests_from_file(Path(arguments.input), columns, tools)
    if columns:
        raise ConfigError("--columns: has no effect without --input. Remove it.", "no-effect")
    if arguments.text and tools:
        raise ConfigError("--tools: has no effect on texts. Remove it.", "no-effect")
    if arguments.text:
        seconds = arguments.text_pair or [None] * len(arguments.text)
        pairs = zip(arguments.text, seconds, strict=True)
        return [ScoringRequest("--text", {"text": a}, ClassificationExample(a, b, "")) for a, b in pairs]
    pairs = zip(arguments.prompt, arguments.response, strict=True)
    variables = {"tools": tools} if tools else {}
    return [
        ScoringRequest("--prompt", {"prompt": p}, Conversation([user(p), assistant(r)], variables=variables))
        for p, r in pairs
    ]


def _requests_from_file(path: Path, columns: dict[str, str], tools: list[dict] | None) -> list[ScoringRequest]:
    """Return the rows of a file: texts or pairs, which need no label, or conversations.

    Raises:
        DataError: A row is neither, or the file has both.
    """
    check_is_file(path)
    if format_of(path) not in FORMATS:
        raise DataError(f"{path}: expected a .{', .'.join(FORMATS)} file. Convert it.", "wrong-format")
    dataset, requests = DatasetConfig(str(path), columns=columns, tools=tools), []
    for line, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            requests.append(ScoringRequest(f"{path}:{line}", row, _example(row, dataset)))
        except DataError as error:
            raise error.at(f"{path}:{line}") from None
        if type(requests[-1].example) is not type(requests[0].example):
            raise DataError(
                f"{path}:{line}: the file mixes texts to classify and conversations. Use one file for each.",
                "invalid-row",
            )
    if tools and requests and isinstance(requests[0].example, ClassificationExample):
        raise ConfigError("--tools: has no effect on texts. Remove it.", "no-effect")
    if not requests:
        raise DataError(f"{path}: has no rows. Add at least one.", "no-data")
    return requests


def _example(row: dict, dataset: DatasetConfig) -> Example:
    keys = {"label", *row, *dataset.columns}
    for column in (dataset.columns.get(key, key) for key in ("steps", "completions")):
        if isinstance(steps := row.get(column), list):
            return to_example(row | {"labels": [0] * len(steps)}, dataset, "solution")
    if not any(keys.issuperset(row_format.required) for row_format in row_formats_of("classification").values()):
        return to_example(row, dataset)
    return to_example(row | {"label": "unknown"}, dataset, "classification")
