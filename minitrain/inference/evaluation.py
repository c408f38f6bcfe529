"""All metrics of an evaluation: those of the loss, and how many generated answers are right."""

import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from minitrain.config.sections import DatasetConfig, EvalGenerateConfig
from minitrain.data.loader import MicrobatchLoader, TokenizedDataset, load_data
from minitrain.data.rows import rows_object
from minitrain.errors import ConfigError
from minitrain.losses import add_features
from minitrain.training.aux_models import reference_kind
from minitrain.training.setup import make_loader
from minitrain.training.step import evaluate

from .generate import Generator, Sampling

if TYPE_CHECKING:
    from minitrain.trainer import Trainer


def evaluate_all(trainer: "Trainer", loader: MicrobatchLoader) -> dict[str, float]:
    """Return the metrics on the examples of a loader; {} when a signal came. All ranks call it."""
    config, models, parallel = trainer.config, trainer.models, trainer.parallel
    stop = trainer.is_interrupted
    metrics = evaluate(trainer.loss, loader.eval_batches, models, parallel, trainer.precision, stop)
    if metrics and config.eval_generate.n_examples:
        say = trainer.logger.info if trainer.logger else lambda line: None
        with trainer.precision.autocast():
            metrics["exact_match"] = exact_match(
                trainer.generator, loader.examples, config.eval_generate, config.eval_batch_size, say, not config.quiet
            )
    return metrics


def load_rows(trainer: "Trainer", rows: Any) -> MicrobatchLoader:
    """Return the loader of rows to evaluate on. Raises ConfigError or DataError. All ranks call it."""
    config, loss, parallel = trainer.config, trainer.loss, trainer.parallel
    if "reference" in loss.requires and reference_kind(loss, config) == "precomputed":
        raise ConfigError("dataset: has no log-probabilities of the reference. Set loss.reference=model.", "conflict")
    given = rows_object(rows, "dataset")
    chosen = dataclasses.replace(
        config, datasets=[DatasetConfig(given.identifier)], eval_datasets=[], validation_split=0
    )
    with parallel.local_rank0_first():
        data = load_data(chosen, trainer.template, loss.example_type)
        add_features(loss, trainer.train_loader.examples.caches, data.train.caches)
    parallel.check_same(dataset=[cache.key for cache in data.train.caches])
    return make_loader(data.train, config, trainer.tokenizer, trainer.policy, parallel.rank, parallel.world_size)


# 1,234.50 or .5 or 3/4 or 2e-3; a minus counts where it stands between no two things.
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+|[eE][+-]?\d{1,2})?")


def exact_match(
    generator: Generator,
    examples: TokenizedDataset,
    settings: EvalGenerateConfig,
    batch_size: int,
    say: Callable[[str], None],
    progress: bool = True,
) -> float:
    """Share of the first `n_examples` whose greedy answer is the reference, as far as `settings.match` looks at it.

    `say` gets a line for each of the first `show` answers.
    """
    tokenizer = generator.tokenizer
    chosen = examples.first(settings.n_examples)
    prompts, references = [], []
    for document in (chosen[i][0] for i in range(len(chosen))):
        start = len(document.mask) - document.mask.flip(0).tolist().index(0)  # where the last answer begins
        prompts.append(document.ids[:start].tolist())
        references.append(tokenizer.decode(document.ids[start:], skip_special_tokens=True))
    answers = generator.generate_from_ids(prompts, Sampling(settings.max_new_tokens), batch_size, progress)
    found = [(final_answer(a, settings.match), final_answer(r, settings.match)) for a, r in zip(answers, references)]
    matches = [answer is not None and answer == reference for answer, reference in found]
    for i in range(min(settings.show, len(answers))):
        prompt = tokenizer.decode(prompts[i], skip_special_tokens=True)
        verdict = "right" if matches[i] else f"wrong, expected {_short(str(found[i][1]))}"
        shown = _short(answers[i].strip(), from_end=settings.match != "text")
        say(f"  {_short(prompt.strip(), from_end=True)} -> {shown} ({verdict})")
    return sum(matches) / len(matches)


def final_answer(text: str, match: str) -> str | Fraction | None:
    """What of an answer is compared, by `eval_generate.match`; None if there is nothing of the kind.

    For `number`, the text behind the last ####, else in the last \\boxed{}, else the last number. Numbers compare by
    what they are worth: 1,000 is 1000.00 and $1000, 3/4 is 0.75. What is no number (\\boxed{x+1}) compares as text.
    """
    if match == "text":
        return text.strip()
    if match != "number":
        groups = list(filter(None, re.findall(match, text)))
        return _value(groups[-1]) if groups else None
    if "####" in text:
        stated = text.rpartition("####")[2].strip().partition("\n")[0]
        number = NUMBER.search(_plain(stated))
        return _value(number[0]) if number else _value(stated) or None
    if (boxed := _last_boxed(text)) is not None:
        return _value(boxed)
    numbers = NUMBER.findall(_plain(text))
    return _value(numbers[-1]) if numbers else None


def _value(text: str) -> str | Fraction:
    """A number as what it is worth, other text without what is not part of an answer."""
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
    r"""What stands in the last \boxed{...}, braces within it paired."""
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
