"""Evaluate any model as a training does, with the data, loss and template of a config or on plain files."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tqdm import tqdm

from minitrain.batch import Batch
from minitrain.config.schema import Config
from minitrain.config.sections import LoRAConfig, ModelConfig, SoftPromptConfig
from minitrain.data.loader import MicrobatchLoader, TokenizedDataset
from minitrain.distributed.parallel import SingleDevice, pick_device
from minitrain.distributed.process import world_size
from minitrain.errors import ConfigError
from minitrain.inference.evaluation import evaluate_all, example_result
from minitrain.inference.generate import model_config
from minitrain.inference.resolve import find_model
from minitrain.io.redact import redact
from minitrain.losses import Models, create_loss
from minitrain.model.load import DTYPES, build_frozen, trained_outputs
from minitrain.model.vocabulary import count_ids
from minitrain.rl.engine import build_engine
from minitrain.rl.rounds import make_rounds
from minitrain.training.aux_models import (
    REF_LOGPS,
    PrecomputedRefLogps,
    Teacher,
    build_teacher,
    load_teacher,
)
from minitrain.training.compute import with_dtype
from minitrain.training.drift import against_start, kl_loss
from minitrain.training.setup import Preparation, make_loader, prepare, prepare_policy
from minitrain.training.step import Precision, evaluate

from ..stage import Stage

UNTRAINED = {  # options of a training that an evaluation does without
    "lora": LoRAConfig(),
    "soft_prompt": SoftPromptConfig(),
    "freeze_layers": [],
    "compile": False,
    "activation_checkpointing": "none",
    "activation_offload": False,
    "retention_datasets": [],
    "eval_kl_to_start": False,
}


KL = "kl_to_reference"


class Task(NamedTuple):
    """What to evaluate models on.

    Attributes:
        name: The name of a config, or "" for plain files.
        config: The config; plain files are its evaluation data.
        rows: Number of examples of each plain file; None for all.
    """

    name: str
    config: Config
    rows: int | None = None


class Result(NamedTuple):
    """The metrics of a model on a data set.

    Attributes:
        examples: The results of each example, with its file and line; [] if they were not requested.
    """

    model: str
    data: str
    n_examples: int
    metrics: dict[str, float]
    examples: list[dict[str, Any]]


def evaluate_model(source: str, task: Task, reference: str | None = None, by_example: bool = False) -> list[Result]:
    """Return the metrics of a model on each data set of a task and, for a config with several, on all of them.

    Args:
        source: A run directory, the folder of a model or an adapter, or the name of a Hub model.
        reference: Another model. `kl_to_reference` is KL(model || reference), and a loss with a reference uses it.
        by_example: Also return the results of each example. Each is then a batch of its own.

    Raises:
        ConfigError: A model does not exist, or does not fit the config.
        DataError: A data row cannot be used.
    """
    stage, run = load_stage(source, task, reference)
    data = run.data.eval
    if data is None:
        message = f"{task.name}: has no evaluation data. Set eval_datasets or validation_split, or name data files."
        raise ConfigError(message, "no-data")
    _report_rows(run, data)
    pairs = zip(data.caches, data.weights, data.selected, strict=True)
    parts = [(str(c.source), TokenizedDataset([c], [w], [s])) for c, w, s in pairs]
    if task.name:
        parts = [*(parts if len(parts) > 1 else []), (task.name, data)]
    return [_evaluate(stage, source, name, examples.first(task.rows), by_example) for name, examples in parts]


def _report_rows(run: Preparation, data: TokenizedDataset) -> None:
    """Report on stderr what became of rows of the evaluation data that were skipped, dropped or truncated."""
    sources = tuple(f"{cache.source}: " for cache in data.caches)
    lines = run.data.warnings + ([] if run.config.quiet else run.data.summary)
    for line in dict.fromkeys(line for line in lines if line.startswith(sources)):
        print(redact(line), file=sys.stderr)


def load_stage(source: str, task: Task, reference: str | None) -> tuple[Stage, Preparation]:
    """Load a model, the data of a task, and the other models that its loss requires."""
    if world_size() > 1:
        raise ConfigError("minitrain evaluate supports one process only. Start it without torchrun.", "conflict")
    parallel = SingleDevice(pick_device(task.config.device))
    config = with_dtype(task.config, parallel.device)
    model = as_evaluated(source, config.model)
    loss = create_loss(**_loss_options(source, model, config.loss))
    evaluated = dataclasses.replace(config, model=model, **UNTRAINED)
    run = prepare(evaluated, loss, parallel)
    if reference is not None and (loss.online or not loss.writes_text):
        raise ConfigError("--reference: has no effect on sampled answers and on scores. Remove it.", "no-effect")
    precision = Precision(DTYPES[model.policy_dtype], parallel.device)
    policy = prepare_policy(run.policy, run.weights, evaluated, parallel, precision, dropout=False)
    policy.requires_grad_(False)
    frozen: dict[str, Any] = {}
    required = frozenset() if loss.online else loss.requires  # sampled answers are only judged
    if "teacher" in required:
        frozen["teacher"] = load_teacher(loss, evaluated, run.template.tokenizer, parallel)
    if reference is not None:
        other = as_evaluated(reference, config.model)
        frozen["start"] = _load_frozen(other, run, parallel, "--reference")
    if "reference" in required:
        frozen["reference"] = frozen.get("start") or _start_of(task, config, run, parallel)
    models = Models(policy, **frozen)
    return Stage(evaluated, loss, policy, run.template, run.train_loader, parallel, models), run


def as_evaluated(source: str, options: ModelConfig) -> ModelConfig:
    """Return model options that load a model for an evaluation, computed as in a training with these options."""
    found = model_config(find_model(source), options.trust_remote_code)
    is_same = found.name_or_path == options.name_or_path
    return dataclasses.replace(
        options,
        name_or_path=found.name_or_path,
        tokenizer_name_or_path=found.tokenizer_name_or_path,
        revision=found.revision or (options.revision if is_same else None),
        adapter=found.adapter,
        quantization=found.quantization,
        archive=None,
        master_dtype="bfloat16" if options.policy_dtype == "bfloat16" else "float32",
        master_weights="model",
    )


def _loss_options(source: str, model: ModelConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the loss, for a classifier with the labels of its head. Raises ConfigError."""
    labels, is_text = trained_outputs(model), create_loss(**options).head_labels is None
    if labels is None or not is_text:
        has_names = labels is not None and options["name"] == "classify" and not options.get("regression")
        return {"labels": labels} | options if has_names else options
    raise ConfigError(
        f"{source}: the model returns scores, not text. Name the config of its training, or set "
        "--overrides loss.name=classify or pairwise.",
        "unsupported-model",
    )


def _start_of(task: Task, config: Config, run: Preparation, parallel: SingleDevice) -> Teacher | PrecomputedRefLogps:
    """Return the reference of a loss: logps of the data rows, or the model before training."""
    caches = [cache for loader in run.loaders for cache in loader.examples.caches]
    if all(REF_LOGPS in cache.token_features for cache in caches):
        return PrecomputedRefLogps()
    if not task.name:
        message = f"--reference: is missing. The loss {config.loss['name']} compares with the model before training."
        raise ConfigError(f"{message} Name it.", "missing-option")
    model = dataclasses.replace(config.model, policy_dtype=config.model.reference_dtype or config.model.policy_dtype)
    return _load_frozen(model, run, parallel, "model.name_or_path")


def _load_frozen(model: ModelConfig, run: Preparation, parallel: SingleDevice, key: str) -> Teacher:
    tokenizer, packing = run.template.tokenizer, run.config.packing
    policy = build_teacher(model, tokenizer, packing, build_frozen, key)
    return Teacher(policy, parallel, DTYPES[model.policy_dtype], count_ids(tokenizer), packing)


def _evaluate(stage: Stage, source: str, name: str, examples: TokenizedDataset, by_example: bool) -> Result:
    """Return the metrics on a data set."""
    loader = make_loader(examples, stage.config, stage.tokenizer, stage.policy)
    if not stage.config.quiet:
        loader.eval_batches = _with_bar(loader.eval_batches, len(list(loader.eval_layout())), name)
        loader.single_batches = _with_bar(loader.single_batches, len(examples), name)
    results: list[dict[str, Any]] | None = [] if by_example else None
    if stage.loss.online:
        rounds = make_rounds(stage, build_engine(stage))
        try:
            metrics = rounds.evaluate(loader, results)
        finally:
            rounds.workers.close()
    else:
        metrics = evaluate_all(stage, loader, results)
        if stage.models.start is not None:
            metrics[KL] = _kl(stage, loader, results)
    located = [examples.locate(i) for i in range(len(examples))] if by_example else []
    wheres = [{"data": str(cache.source), "line": int(cache.lines[number])} for cache, number in located]
    rows = [{"model": source, **where, **result} for where, result in zip(wheres, results or [], strict=True)]
    return Result(source, name, len(examples), metrics, rows)


def _kl(stage: Stage, loader: MicrobatchLoader, results: list[dict[str, Any]] | None) -> float:
    """Return KL(model || reference), the mean over the targets, and add that of each example to its results."""
    loss, outputs = kl_loss(), []
    batches = loader.eval_batches if results is None else loader.single_batches
    keep = (lambda output: None) if results is None else outputs.append
    rest = stage.parallel, stage.precision, stage.is_interrupted, keep
    metrics = evaluate(loss, batches, against_start(stage.models), *rest)
    for result, output in zip(results or (), outputs):
        of_example = example_result(output, loss)
        result[KL], result["weights"][KL] = of_example["kl"], of_example["weights"]["kl"]
    return metrics["kl"]


def _with_bar(batches: Callable[[], Iterator[Batch]], total: int, name: str) -> Callable[[], Iterator[Batch]]:
    """Return `batches`, which then show a progress bar on a terminal."""

    def shown() -> Iterator[Batch]:
        yield from tqdm(batches(), desc=name, total=total, unit=" batches", disable=None, leave=False)

    return shown
