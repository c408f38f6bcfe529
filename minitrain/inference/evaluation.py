"""Compute the metrics of an evaluation: those of the loss, and exact match of generated responses."""

import dataclasses
import json
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from minitrain.batch import Document
from minitrain.config.sections import DatasetConfig, EvalGenerateConfig
from minitrain.data.loader import MicrobatchLoader, TokenizedDataset, load_data
from minitrain.data.messages import user
from minitrain.data.rows import rows_object
from minitrain.data.template import Template
from minitrain.errors import ConfigError
from minitrain.losses import add_features
from minitrain.training.aux_models import reference_kind
from minitrain.training.setup import make_loader
from minitrain.training.step import evaluate

from .generate import Generator, Sampling
from .parse import Response

if TYPE_CHECKING:
    from minitrain.trainer import Trainer


def evaluate_all(trainer: "Trainer", loader: MicrobatchLoader) -> dict[str, float]:
    """Return the metrics on the examples of a loader; {} after a signal. All ranks must call it."""
    config, models, parallel = trainer.config, trainer.models, trainer.parallel
    stop = trainer.is_interrupted
    metrics = evaluate(trainer.loss, loader.eval_batches, models, parallel, trainer.precision, stop)
    if metrics and config.eval_generate.n_examples:
        log = trainer.logger.info if trainer.logger else lambda line: None
        with trainer.precision.autocast():
            metrics["exact_match"] = exact_match(
                trainer.generator, loader.examples, config.eval_generate, config.eval_batch_size, log, not config.quiet
            )
    return metrics


def load_rows(trainer: "Trainer", rows: Any) -> MicrobatchLoader:
    """Return a loader of rows to evaluate on. Raises ConfigError or DataError. All ranks must call it."""
    config, loss, parallel = trainer.config, trainer.loss, trainer.parallel
    if "reference" in loss.requires and reference_kind(loss, config) == "precomputed":
        raise ConfigError(
            "dataset: rows from Python have no reference log-probabilities. Set loss.reference=model.", "conflict"
        )
    given = rows_object(rows, "dataset")
    chosen = dataclasses.replace(
        config, datasets=[DatasetConfig(given.identifier)], eval_datasets=[], validation_split=0
    )
    with parallel.local_rank0_first():
        data = load_data(chosen, trainer.template, loss.data_kind)
        if not loss.online:
            add_features(loss, trainer.train_loader.examples.caches, data.train.caches)
    parallel.check_same(dataset=[cache.key for cache in data.train.caches])
    rest = parallel.rank, parallel.world_size, trainer.train_loader.prefetch
    loader = make_loader(data.train, config, trainer.tokenizer, trainer.policy, *rest)
    loader.given = given  # the rows stay readable while the loader is in use
    return loader


# 1,234.50 or .5 or 3/4 or 2e-3. A minus after a word or a parenthesis is an operator.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+|[eE][+-]?\d{1,2})?")


def exact_match(
    generator: Generator,
    examples: TokenizedDataset,
    settings: EvalGenerateConfig,
    batch_size: int,
    log: Callable[[str], None],
    progress: bool = True,
) -> float:
    """Return the fraction of examples whose greedy response matches the reference.

    Args:
        generator: The model.
        examples: The evaluation data, of which the first `settings.n_examples` are used.
        settings: The options.
        batch_size: Number of prompts per batch.
        log: Called with a line for each of the first `settings.show` responses.
        progress: Show a progress bar.
    """
    tokenizer = generator.tokenizer
    examples = examples.first(settings.n_examples)
    prompts, references = [], []
    for document in (examples[i][0] for i in range(len(examples))):
        start = response_start(document, generator.template)
        prompts.append(document.ids[:start].tolist())
        references.append(generator.parser.parse(prompts[-1], document.ids[start:].tolist()))
    responses = generator.generate_from_ids(prompts, Sampling(settings.max_new_tokens), batch_size, progress)
    matches = [is_match(r, reference, settings.match) for r, reference in zip(responses, references, strict=True)]
    for i in range(min(settings.show, len(responses))):
        prompt = tokenizer.decode(prompts[i], skip_special_tokens=True)
        expected = final_answer(references[i].message["content"], settings.match)
        expected = json.dumps(references[i].functions) if references[i].functions else str(expected)
        log_answer(log, prompt, responses[i].text, expected, matches[i], settings)
    return sum(matches) / len(matches)


def log_answer(
    log: Callable[[str], None], prompt: str, answer: str, expected: str, is_right: bool, settings: EvalGenerateConfig
) -> None:
    """Log a prompt with its greedy answer, and with the expected final answer if that differs."""
    result = "right" if is_right else f"wrong, expected {_short(expected)}"
    shown = _short(answer.strip(), from_end=settings.match != "text")
    log(f"  {_short(prompt.strip(), from_end=True)} -> {shown} ({result})")


def response_start(document: Document, template: Template) -> int:
    """Return the index of the first token of the last response."""
    start = len(document.mask) - document.mask.flip(0).tolist().index(0)
    if template.targets.train_on_reasoning:
        return start
    # The mask excludes the reasoning, so the response begins after the last header.
    rendering, question = template.renderer.bind({}), [user("a")]
    header = rendering.prompt(question).removeprefix(rendering.text(question))
    ids, header_ids = document.ids[:start].tolist(), template.encoder.encode_text(header)
    n = len(header_ids)
    return next((stop for stop in range(start, n, -1) if ids[stop - n : stop] == header_ids), start)


def is_match(response: Response, reference: Response, match: str) -> bool:
    """Return whether a response has the final answer and the tool calls of the reference; reasoning is not compared."""
    answer, expected = (final_answer(one.message["content"], match) for one in (response, reference))
    if expected is None and not reference.functions:
        return False
    return expected in (None, answer) and response.functions == reference.functions


def final_answer(text: str, match: str) -> str | Fraction | None:
    """Return the final answer of a response, as the option `eval_generate.match` defines it; None without one.

    For `number`, that is the text after the last ####, else in the last \\boxed{}, else the last number. Numbers are
    compared by value: 1,000 equals 1000.00 and $1000, and 3/4 equals 0.75. Anything else (\\boxed{x+1}) is compared as
    text.
    """
    if match == "text":
        return text.strip()
    if match != "number":
        groups = list(filter(None, re.findall(match, text)))
        return _value(groups[-1]) if groups else None
    if "####" in text:
        answer = text.rpartition("####")[2].strip().partition("\n")[0]
        number = NUMBER.search(_plain(answer))
        return _value(number[0]) if number else _value(answer) or None
    if (boxed := _last_boxed(text)) is not None:
        return _value(boxed)
    numbers = NUMBER.findall(_plain(text))
    return _value(numbers[-1]) if numbers else None


def _value(text: str) -> str | Fraction:
    """Return the value of a number, or other text without currency signs and a final period."""
    plain = _plain(text).strip().rstrip(".").strip()
    if not NUMBER.fullmatch(plain):
        return plain
    try:
        return Fraction(plain.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # thousands of digits, or 1/0
        return plain


def _plain(text: str) -> str:
    return re.sub(r"\\[$%]|[$%€£]", "", text).replace("{,}", ",").replace("−", "-")


def _last_boxed(text: str) -> str | None:
    r"""Return the text in the last \boxed{...}, with balanced braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    return None


def _short(text: str, width: int = 60, from_end: bool = False) -> str:
    if len(text) <= width:
        return repr(text)
    return repr("..." + text[3 - width :] if from_end else text[: width - 3] + "...")
