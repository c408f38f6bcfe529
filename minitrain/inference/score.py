"""Labels of texts with their probabilities, or the numbers of a reward model: `minitrain score`."""

from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from minitrain.batch import Document, collate
from minitrain.config.sections import DatasetConfig
from minitrain.data.encode import TruncationConfig, encode
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
from minitrain.data.template import Template
from minitrain.errors import ConfigError, DataError
from minitrain.model.load import load_tokenizer, trained_outputs
from minitrain.model.policy import Policy
from minitrain.model.positions import batches_by_length
from minitrain.model.sequence_head import make_policy

from .generate import load_saved, model_config
from .resolve import find_model


class ScoringRequest(NamedTuple):
    """What is scored: where it stands (for error messages), the row it came in, and what was read in it."""

    where: str
    row: dict
    record: Example


class SequenceScorer:
    """A model that ends in scalars, with its tokenizer."""

    def __init__(self, policy: Policy, template: Template, max_length: int):
        self.policy, self.template = policy.eval(), template
        self.limits = TruncationConfig(max_length)
        config = policy.model.config
        self.n_truncated = 0  # texts that were longer than the model can read
        self.labels = list(config.id2label.values()) if config.problem_type != "regression" else None

    def scores(self, asked: list[ScoringRequest], batch_size: int = 16, progress: bool = False) -> torch.Tensor:
        """The model's outputs -> [n, L] float32, in the order of what is asked. Raises DataError."""
        documents = [self._document(one) for one in asked]
        lengths = [len(document.ids) for document in documents]
        device = self.policy.model.get_input_embeddings().weight.device
        found = {}
        with (
            torch.no_grad(),
            tqdm(total=len(asked), unit=" texts", disable=None if progress else True, leave=False) as bar,
        ):
            for chosen in batches_by_length(lengths, batch_size, self.policy.rotary_limit):
                batch = collate([[documents[i]] for i in chosen], self.template.tokenizer.pad_token_id)
                found |= dict(zip(chosen, self.policy(batch.to(device)).scores.cpu(), strict=True))
                bar.update(len(chosen))
        return torch.stack([found[i] for i in range(len(documents))])

    def verdicts(self, scores: torch.Tensor) -> list[dict]:
        """[n, L] -> for each a `prediction`: a label, with its `probability`, or the number itself."""
        if self.labels is None:
            return [{"prediction": number} for number in scores[:, 0].tolist()]
        probabilities, chosen = scores.softmax(1).max(1)  # [n], [n]
        pairs = zip(chosen.tolist(), probabilities.tolist(), strict=True)
        return [{"prediction": self.labels[number], "probability": probability} for number, probability in pairs]

    def _document(self, asked: ScoringRequest) -> Document:
        try:
            documents = encode(asked.record, self.template, self.limits)
        except DataError as error:
            raise error.at(asked.where) from None
        if isinstance(documents, str):
            raise DataError(f"{asked.where}: nothing to learn after truncation", "too-large")
        (tokens,) = documents
        self.n_truncated += tokens.counts.get("truncated", 0)
        columns = {name: torch.tensor(column) for name, column in tokens.token_features.items()}
        return Document(torch.tensor(tokens.ids), torch.tensor(tokens.mask), token_features=columns)


def load_judge(
    source: str,
    asked: list[ScoringRequest],
    device: str = "auto",
    chat_template: str = "auto",
    trust_remote_code: bool = False,
) -> SequenceScorer:
    """A judge from a run directory (its final/ model, or best/), the folder of a model or adapter, or a hub name.

    `asked` is what it is for: conversations go through the chat template, and texts are read as they are.
    Raises ConfigError.
    """
    config = model_config(find_model(source), trust_remote_code)
    outputs = trained_outputs(config)
    if outputs is None:
        raise ConfigError(
            f"{source}: this model ends in a vocabulary and gives no scores; use `minitrain generate`.",
            "unsupported-model",
        )
    tokenizer = load_tokenizer(config, scores=True)
    texts = all(isinstance(one.record, ClassificationExample) for one in asked)
    template = Template(tokenizer, "none" if texts else chat_template)
    policy = make_policy(load_saved(config, tokenizer, device, outputs))
    return SequenceScorer(policy, template, policy.n_positions)


def line(verdict: dict) -> str:
    """A verdict as the console shows it."""
    return "\t".join(f"{value:.4f}" if isinstance(value, float) else value for value in verdict.values())


def requests_from_args(arguments: Namespace) -> list[ScoringRequest]:
    """What the command line names: texts, pairs of them, prompts with their answers, or a file of any of these.

    Raises ConfigError or DataError.
    """
    given = vars(arguments)
    for half, whole in (("text_pair", "text"), ("response", "prompt")):
        missing = half == "response" and given[whole] and not given[half]
        if missing or (given[half] and len(given[half]) != len(given[whole] or [])):
            counts = f"{len(given[half] or [])} for {len(given[whole] or [])} of --{whole}"
            raise ConfigError(f"--{half.replace('_', '-')}: {counts}; give one for each", "usage")
    columns = dict(pair.partition("=")[::2] for pair in arguments.columns)
    if not all(columns.values()):
        raise ConfigError('--columns: expected NAME=COLUMN, for example text="#1 String"', "usage")
    if arguments.input:
        return _of_file(Path(arguments.input), columns)
    if columns:
        raise ConfigError("--columns would be ignored: it needs --input", "no-effect")
    if arguments.text:
        halves = arguments.text_pair or [None] * len(arguments.text)
        pairs = zip(arguments.text, halves, strict=True)
        return [ScoringRequest("--text", {"text": text}, ClassificationExample(text, half, "")) for text, half in pairs]
    pairs = zip(arguments.prompt, arguments.response, strict=True)
    return [
        ScoringRequest("--prompt", {"prompt": p}, Conversation([user(p), assistant(answer)])) for p, answer in pairs
    ]


def _of_file(path: Path, columns: dict[str, str]) -> list[ScoringRequest]:
    """Rows of a file: texts or pairs by the keys of labelled rows, of which no label is needed, or conversations.

    Raises DataError for a row that is neither, and for rows of both kinds.
    """
    check_is_file(path)
    if format_of(path) not in FORMATS:
        raise DataError(f"{path}: expected a .{', .'.join(FORMATS)} file", "wrong-format")
    dataset, asked = DatasetConfig(str(path), columns=columns), []
    for line, row in read_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            asked.append(ScoringRequest(f"{path}:{line}", row, _record(row, dataset)))
        except DataError as error:
            raise error.at(f"{path}:{line}") from None
        if type(asked[-1].record) is not type(asked[0].record):
            raise DataError(
                f"{path}:{line}: some rows are texts to label and others conversations; use two files", "invalid-row"
            )
    if not asked:
        raise DataError(f"{path}: holds no rows", "no-data")
    return asked


def _record(row: dict, dataset: DatasetConfig) -> Example:
    named = {"label", *row, *dataset.columns}
    if not any(named.issuperset(one.required) for one in row_formats_of("classification").values()):
        return to_example(row, dataset)
    return to_example(row | {"label": "unknown"}, dataset, "classification")
