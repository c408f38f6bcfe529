"""Compute the metrics of an evaluation: those of the loss, and exact match of generated responses."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from minitrain.batch import Document
from minitrain.config.sections import DatasetConfig, EvalGenerateConfig
from minitrain.data.loader import MicrobatchLoader, TokenizedDataset, load_data
from minitrain.data.messages import user
from minitrain.data.rows import rows_object
from minitrain.data.template import Template
from minitrain.errors import ConfigError, DataError
from minitrain.losses import Loss, LossOutput, add_features
from minitrain.training.after_step import warn
from minitrain.training.aux_models import reference_kind
from minitrain.training.setup import make_loader
from minitrain.training.step import evaluate

from .generate import Generator, Sampling
from .parse import Response

if TYPE_CHECKING:
    from minitrain.trainer import Trainer


def evaluate_all(
    trainer: "Trainer", loader: MicrobatchLoader, results: list[dict[str, Any]] | None = None
) -> dict[str, float]:
    """Return the metrics on the examples of a loader; {} after a signal. All ranks must call it.

    Args:
        results: Receives the results of each example, which is then a batch of its own. Only on one rank.
    """
    config, models, parallel = trainer.config, trainer.models, trainer.parallel
    batches, outputs = (loader.eval_batches if results is None else loader.single_batches), []
    keep = (lambda output: None) if results is None else outputs.append
    metrics = evaluate(trainer.loss, batches, models, parallel, trainer.precision, trainer.is_interrupted, keep)
    if results is not None:
        results += [example_result(output, trainer.loss) for output in outputs]
    if metrics and config.eval_generate.n_examples:
        settings, rest = config.eval_generate, (config.eval_batch_size, not config.quiet)
        with trainer.precision.autocast():
            graded = grade(trainer.generator, loader.examples, settings, *rest)
        for one in graded[: settings.show]:
            log_answer(trainer, one.prompt, one.answers[0], one.expected, one.matches[0])
        wheres = [loader.examples.where(i) for i, one in enumerate(graded) if one.expected is None]
        warn_of_references(trainer, wheres, len(graded))
        metrics |= answer_metrics(graded)
        for result, one in zip(results or (), graded):
            result |= {
                "prompt": one.prompt,
                "expected": one.expected,
                "answer": one.answers[0],
                "samples": one.answers[1:],
            }
            for name, value in answer_metrics([one]).items():
                result[name] = value
                result["weights"][name] = 1.0
    return metrics


def example_result(output: LossOutput, loss: Loss) -> dict[str, Any]:
    """Return the metrics of one example, and the weights by which those that are means are averaged."""
    pairs = {"loss": (output.loss_sum, output.num_items), **output.metrics}
    sums = {name: (float(total), float(weight)) for name, (total, weight) in pairs.items()}
    means = {name: total / weight for name, (total, weight) in sums.items() if weight}
    metrics = loss.finalize_metrics(dict(means)) if len(means) == len(sums) else means
    weights = {name: sums[name][1] for name, value in means.items() if metrics.get(name) == value}
    return {**metrics, "weights": weights}


def load_rows(trainer: "Trainer", rows: Any) -> MicrobatchLoader:
    """Return a loader of rows to evaluate on. Raises ConfigError or DataError. All ranks must call it."""
    config, loss, parallel = trainer.config, trainer.loss, trainer.parallel
    if "reference" in loss.requires and reference_kind(loss, config) == "precomputed":
        raise ConfigError(
            "dataset: rows from Python have no reference log-probabilities. Set loss.reference=model.", "conflict"
        )
    given = rows_object(rows, "dataset")
    chosen = dataclasses.replace(
        config,
        datasets=[DatasetConfig(given.identifier)],
        eval_datasets=[],
        retention_datasets=[],
        validation_split=0,
    )
    with parallel.local_rank0_first():
        data = load_data(chosen, trainer.template, loss.data_kind, loss.uses_partners)
        if not loss.online:
            add_features(loss, trainer.train_loader.examples.caches, data.train.caches)
    parallel.check_same(dataset=[cache.key for cache in data.train.caches])
    rest = parallel.rank, parallel.world_size, trainer.train_loader.prefetch
    loader = make_loader(data.train, config, trainer.tokenizer, trainer.policy, *rest)
    loader.given = given  # the rows stay readable while the loader is in use
    return loader


# 1,234.50 or .5 or 3/4 or 2e-3. A minus after a word or a parenthesis is an operator.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+|[eE][+-]?\d{1,2})?")


class GradedPrompt(NamedTuple):
    """A prompt with the answers of the model.

    Attributes:
        prompt: Its text.
        expected: The final answer of the reference, or None if it has none, so that no answer matches.
        answers: The greedy answer, and `eval_generate.num_generations` samples if that is above 1.
        matches: Whether each of them matches the reference.
    """

    prompt: str
    expected: str | None
    answers: list[str]
    matches: list[bool]


def grade(
    generator: Generator,
    examples: TokenizedDataset,
    settings: EvalGenerateConfig,
    batch_size: int,
    progress: bool = True,
) -> list[GradedPrompt]:
    """Return the first `settings.n_examples` prompts, each with the model's answers, compared with the reference.

    Args:
        generator: The model.
        examples: The evaluation data.
        settings: The options.
        batch_size: Number of prompts per batch.
        progress: Show a progress bar.
    """
    examples = examples.first(settings.n_examples)
    prompts, references = [], []
    for document in (examples[i][0] for i in range(len(examples))):
        start = response_start(document, generator.template)
        prompts.append(document.ids[:start].tolist())
        references.append(generator.parser.parse(prompts[-1], document.ids[start:].tolist()))
    responses = [
        [one] for one in generator.generate_from_ids(prompts, Sampling(settings.max_new_tokens), batch_size, progress)
    ]
    if (n := settings.num_generations) > 1:
        generator.calls = 0  # the random numbers are the same in each evaluation
        sampling = Sampling(settings.max_new_tokens, settings.temperature)
        copies = [prompt for prompt in prompts for _ in range(n)]
        sampled = generator.generate_from_ids(copies, sampling, batch_size, progress)
        responses = [greedy + sampled[i * n : (i + 1) * n] for i, greedy in enumerate(responses)]
    graded = []
    texts = prompt_texts(prompts, generator.template)
    for prompt, reference, answers in zip(texts, references, responses, strict=True):
        final = final_answer(reference.message["content"], settings.match)
        expected = json.dumps(reference.functions) if reference.functions else final_text(final)
        matches = [is_match(answer, reference, settings.match) for answer in answers]
        graded.append(GradedPrompt(prompt, expected, [answer.text for answer in answers], matches))
    return graded


def answer_metrics(graded: Sequence[GradedPrompt]) -> dict[str, float]:
    """Return the fraction of right greedy answers, and pass@k of the samples for k = 1, 2, 4, ... if there are any."""
    metrics = {"exact_match": sum(one.matches[0] for one in graded) / len(graded)}
    n, k = len(graded[0].matches) - 1, 1
    while k <= n:
        metrics[f"pass@{k}"] = sum(pass_at_k(n, sum(one.matches[1:]), k) for one in graded) / len(graded)
        k *= 2
    return metrics


def answer_names(settings: EvalGenerateConfig) -> list[str]:
    """Return the names of the metrics of generated answers."""
    matches = [False] * (1 + settings.num_generations * (settings.num_generations > 1))
    return list(answer_metrics([GradedPrompt("", "", [], matches)])) if settings.n_examples else []


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k samples is right, if `n_right` of n are.

    1 - C(n - c, k) / C(n, k), Chen et al. 2021 (arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(n - n_right, k) / math.comb(n, k)


def prompt_texts(prompts: Sequence[list[int]], template: Template) -> list[str]:
    """Return the user's text of prompts that are one turn of the user, and others with their special tokens."""
    options, probe = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}, "a probe"
    texts = [template.tokenizer.decode(ids, **options) for ids in prompts]
    try:
        framed = template.tokenizer.decode(template.encode_prompt([user(probe)]), **options)
    except DataError:  # the template refuses this very conversation
        return texts
    before, found, after = framed.partition(probe)
    pattern = re.compile(f"{re.escape(before)}(.*){re.escape(after)}", re.DOTALL)
    matches = [pattern.fullmatch(text) if found else None for text in texts]
    return [match[1] if match else text for match, text in zip(matches, texts)]


def warn_of_references(trainer: "Trainer", wheres: Sequence[str], n: int) -> None:
    """Print how many of n references have no final answer, given where these are; all ranks may call it."""
    if wheres:
        rest = f"no final answer by eval_generate.match={trainer.config.eval_generate.match}"
        rest += f", so their answers count as wrong: {_list(wheres)}"
        warn(trainer, f"warning: {len(wheres)} of {n} references have {rest}")


def _list(wheres: Sequence[str], n_shown: int = 3) -> str:
    more = len(wheres) - n_shown
    return "; ".join(wheres[:n_shown]) + (f"; and {more} more" if more > 0 else "")


def log_answer(trainer: "Trainer", prompt: str, answer: str, expected: str | None, is_right: bool) -> None:
    """Log and save a prompt with its greedy answer, and with the expected final answer if that differs."""
    if trainer.logger is None:
        return
    settings = trainer.config.eval_generate
    sample = {"prompt": prompt, "answer": answer, "expected": expected, "right": is_right}
    trainer.logger.log_sample(trainer.step, sample)
    wanted = "the reference has no final answer" if expected is None else f"expected {_short(expected)}"
    result = "right" if is_right else f"wrong, {wanted}"
    shown = _short(answer.strip(), from_end=settings.match != "text")
    trainer.logger.info(f"  {_short(prompt.strip(), from_end=True)} -> {shown} ({result})")


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


def final_text(final: str | Fraction | None) -> str | None:
    """Return a final answer as it is shown and written to files."""
    return None if final is None else str(final)


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
    text = text.replace("\ufffd", "?")  # for bytes that are not UTF-8, as an untrained model writes
    if len(text) <= width:
        return repr(text)
    return repr("..." + text[3 - width :] if from_end else text[: width - 3] + "...")
