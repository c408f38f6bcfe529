"""Check a config and every row of its data, and report what a training would do: `minitrain validate`."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from minitrain.config.schema import Config
from minitrain.data.cache import TokenCache
from minitrain.data.counts import describe_counts, describe_fields, describe_unread
from minitrain.data.examples import OF_TEXTS, Conversation, assistant, user
from minitrain.data.loader import MicrobatchLoader
from minitrain.data.template import Template
from minitrain.distributed.parallel import SingleDevice, pick_device
from minitrain.errors import DataError, MinitrainError
from minitrain.io.system import total_memory
from minitrain.losses import create_loss
from minitrain.model.diagnostics import check_weights_exist, first_line, log_model_warnings
from minitrain.model.few_blocks import with_few_blocks
from minitrain.model.load import CPU, DTYPES, META, build_frozen
from minitrain.model.load_check import check_autocast
from minitrain.model.multimodal import describe_text_part
from minitrain.model.router import describe_aux_loss
from minitrain.model.sequence_head import is_encoder
from minitrain.model.state_dict import read_archive
from minitrain.model.trial import check_meta_policy
from minitrain.model.vocabulary import describe_new_tokens
from minitrain.training.after_step import KNOWN_METRICS, check_metric
from minitrain.training.aux_models import build_teacher, teacher_config
from minitrain.training.checkpoint import check_checkpoint
from minitrain.training.compute import describe_compute
from minitrain.training.learning_rate import batch_hints, describe_optimizer, with_defaults
from minitrain.training.run_dir import RunDir
from minitrain.training.saving import input_fingerprints
from minitrain.training.setup import Preparation, check_lengths, dry_run, make_loader
from minitrain.training.step import Precision

from .duplicates import describe_duplicates
from .load import check_python_config
from .memory import MemoryEstimate, estimate_memory, eval_metrics
from .memory_rounds import describe_sampling
from .online import Trial, describe_round, describe_rounds, play_round
from .preview import BRACKETS, Marks

MAX_REPORTED = 3  # rows per problem and file


def validate(config: Config, devices: int = 1, with_memory: bool = True, marks: Marks = BRACKETS) -> dict[str, str]:
    """Return a report of a training, from every row of its files and its model's config.

    Args:
        config: The config.
        devices: Number of devices for the estimate of memory.
        with_memory: Estimate the peak memory too, which simulates a step.
        marks: Marks around the sampled tokens of a round.

    Returns:
        The lines of the report by name.

    Raises:
        ConfigError: An option does not fit the model, the data or the run directory.
        DataError: A row cannot be read, has no targets, or would train on something unintended.
    """
    config = check_python_config(config)
    parallel = SingleDevice(pick_device(config.device))
    config = with_defaults(config, parallel.device, create_loss(**config.loss))
    folder = RunDir(config, parallel)
    run = dry_run(config)
    warnings = run.data.warnings + _try_out(run) + _try_resuming(run, folder)
    trial = play_round(run) if run.loss.online else None
    _check_metric(run, trial)
    problems = [line for cache in _caches(run) for line in find_bad_rows(cache, run)]
    if problems:
        raise DataError("\n".join(problems), "wrong-tokens")
    duplicates = describe_duplicates(run.data.train, run.data.eval, run.loss.data_kind)
    warned = ("leaks",) if run.loss.example_type == "rollout" else ("leaks", "duplicates")  # samples may be equal
    warnings += [text.partition(":")[0] for name, text in duplicates.items() if name in warned and text != "none"]
    lines = _report(run) | duplicates
    if trial is not None:
        lines["round"] = describe_round(trial, run.template, marks)
        warnings += trial.warnings()
    if with_memory:
        lines |= _memory(run, parallel.device, devices)
    if "warning" in lines:
        warnings.append(lines.pop("warning"))
    return lines | ({"warning": "; ".join(warnings)} if warnings else {})


def _try_out(run: Preparation) -> list[str]:
    """Make the checks that training makes before its first step; return warnings. Raise ConfigError."""
    config, tokenizer = run.config, run.template.tokenizer
    check_weights_exist(config.model, run.loss.head_labels)
    log_model_warnings(config.model.name_or_path, run.policy.model.load_notes)
    if config.model.archive:
        read_archive(run.policy.model, Path(config.model.archive))
    policy = run.meta_policy()
    warnings = check_meta_policy(policy, config.packing)
    precision = Precision(DTYPES[config.model.policy_dtype], CPU)
    if precision.dtype != torch.float32:
        with_few_blocks(policy, lambda: check_autocast(policy, precision.autocast()))
    run.policy.groups_documents = policy.groups_documents
    if "teacher" in run.loss.requires:
        teacher = teacher_config(run.loss, config)
        teacher_policy = build_teacher(teacher, tokenizer, config.packing, functools.partial(build_frozen, device=META))
        check_weights_exist(teacher, None)
        log_model_warnings(teacher.name_or_path, teacher_policy.model.load_notes)
        for loader in run.loaders:
            check_lengths(loader.examples, teacher_policy)
        warnings += [f"teacher: {warning}" for warning in check_meta_policy(teacher_policy, config.packing)]
    return warnings


def _try_resuming(run: Preparation, folder: RunDir) -> list[str]:
    """Check the run directory and its checkpoint as training does; return warnings. Raise RunDirError."""
    if finished := folder.finished(run.train_loader.total_steps):
        return [*folder.messages, finished]
    checkpoint = folder.find_checkpoint()
    if checkpoint is not None:
        state = check_checkpoint(checkpoint, run.policy)
        folder.check_fingerprints(checkpoint, state["inputs"], input_fingerprints(run.config, run.data.train))
    return folder.messages


def _check_metric(run: Preparation, trial: Trial | None) -> None:
    """Raise ConfigError if the evaluation lacks the metric of early stopping, as far as can be known."""
    metric = run.config.early_stopping.metric
    if run.data.eval is None or metric in KNOWN_METRICS:
        return
    if trial is not None:
        if not metric.startswith("reward/"):  # a function can return other numbers besides
            check_metric(metric, trial.metrics())
        return
    try:
        known = eval_metrics(run)
    except MinitrainError:
        raise
    except Exception:  # a model may need the values of its tensors
        return
    check_metric(metric, known)


# ----------------------------------------------------------------------------------------------------------- bad rows


def find_bad_rows(cache: TokenCache, run: Preparation) -> Iterator[str]:
    """Yield a message for each row of a file whose tokens are wrong."""
    kind, template = run.loss.data_kind, run.template
    checks: list[tuple[np.ndarray, str]] = []  # documents, problem
    if kind == "classification":
        checks.append((np.flatnonzero(np.isnan(cache.doc_features["label"])), "has no label. Add one"))
    elif kind not in (*OF_TEXTS, "prompt"):
        checks.append(
            (np.flatnonzero(_n_targets(cache) == 0), "has no targets. Check the row, max_length and train_on")
        )
    if kind not in (*OF_TEXTS, "rollout", "prompt", "solution"):  # a rollout may end where its sampling was cut off
        problem = f"a target response does not end in {_end_tokens(template)}, so the model would not learn to stop"
        documents = _without_end(cache, template.end_ids(), run.config.max_length)
        # The partner of an unpaired preference may be truncated.
        has_partners = kind == "unpaired_preference" and run.loss.uses_partners
        checks.append(
            (
                documents[documents % 2 == 0] if has_partners else documents,
                f"{problem}. Check the chat template",
            )
        )
    checks.append(
        (
            _with_second_bos(cache, kind, template, run.config.max_length),
            f"has more than one {template.tokenizer.bos_token!r}. Remove it from the row or the chat template",
        )
    )
    for documents, problem in checks:
        examples = np.unique(np.searchsorted(cache.first_documents, documents, side="right") - 1)
        for line in cache.lines[examples[:MAX_REPORTED]]:
            yield f"{cache.source}:{line}: {problem}."
        if len(examples) > MAX_REPORTED:
            yield f"{cache.source}: the same in {len(examples) - MAX_REPORTED:,} more of {len(cache):,} examples."


def _end_tokens(template: Template) -> str:
    return " or ".join(map(repr, template.tokenizer.convert_ids_to_tokens(template.end_ids())))


def _without_end(cache: TokenCache, end_ids: list[int], max_length: int) -> np.ndarray:
    """Return documents with a run of targets that does not end in an end token, except truncated ones."""
    mask = cache.mask.numpy()  # [T]
    # The last token of each run. A document's first token is never a target, so runs do not cross documents.
    last = np.flatnonzero(mask > np.append(mask[1:], np.uint8(0)))
    last = last[~np.isin(cache.ids.numpy()[last], end_ids)]
    documents = _document_of(cache, last)
    stop = cache.offsets[documents + 1]
    is_truncated = (last + 1 == stop) & (stop - cache.offsets[documents] == max_length)
    return documents[~is_truncated]


def _with_second_bos(cache: TokenCache, kind: str, template: Template, max_length: int) -> np.ndarray:
    """Return documents with a second BOS; directly after the first one, if the template begins turns with it."""
    bos = template.tokenizer.bos_token_id
    if bos is None or bos in template.end_ids():
        return np.empty(0, np.int64)
    positions = np.flatnonzero(cache.ids.numpy() == bos)
    documents = _document_of(cache, positions)
    if kind in OF_TEXTS:  # encoded as the tokenizer encodes one or two texts
        allowed = template.tokenizer("a", "b")["input_ids"].count(bos)
        with_bos, counts = np.unique(documents, return_counts=True)
        return with_bos[counts > max(1, allowed)]
    start = cache.offsets[documents]
    if _begins_turns(bos, template):
        is_truncated = (
            cache.offsets[documents + 1] - start == max_length
        )  # truncation keeps the first BOS, before any turn
        return documents[(positions == start + 1) & (cache.ids.numpy()[start] == bos) & ~is_truncated]
    return documents[positions > start]


def _begins_turns(bos: int, template: Template) -> bool:
    try:
        return bos in template.encode(Conversation([user("a"), assistant("b")] * 2)).ids[1:]
    except DataError:  # the template rejects the conversation
        return False


def _n_targets(cache: TokenCache) -> np.ndarray:
    """Return the number of targets of each document, shape [D]."""
    return np.add.reduceat(cache.mask.numpy(), cache.offsets[:-1], dtype=np.int64)


def _document_of(cache: TokenCache, positions: np.ndarray) -> np.ndarray:
    return np.searchsorted(cache.offsets, positions, side="right") - 1


# ---------------------------------------------------------------------------------------------------------- report


def _report(run: Preparation) -> dict[str, str]:
    train, evaluation = run.data.train, run.data.eval
    lengths = train.per_example(lambda cache: np.diff(cache.offsets), np.maximum)  # [E]
    half, most, nearly_all = (int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99))
    parameters, new = list(run.policy.parameters()), describe_new_tokens(run.policy.model, run.template.tokenizer)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    aux_loss = describe_aux_loss(run.policy.routing)
    hints = batch_hints(run.config, run.policy, run.loss, run.train_loader.total_steps)
    return {
        "examples": f"{len(train):,} to train on"
        + (f", {len(evaluation):,} to evaluate on" if evaluation else "")
        + (f", {len(run.data.retention):,} of retention_datasets" if run.data.retention else ""),
        "left out": _left_out(train.caches),
        **_fields(_caches(run)),
        "lengths": f"median {half:,} tokens, 90% up to {most:,}, 99% up to {nearly_all:,}, "
        f"longest {lengths.max():,}; max_length {run.config.max_length:,}",
        **(describe_rounds(run) if run.loss.online else _steps(run)),
        **({"new tokens": new} if new else {}),
        **({"model": text_part} if (text_part := describe_text_part(run.policy.model)) else {}),
        "parameters": f"{trained:,} of {sum(p.numel() for p in parameters):,} trained",
        "matrices": run.policy.model.matrices,
        "compute": describe_compute(run.config, run.policy),
        "optimizer": describe_optimizer(run.config, run.loss, run.warmup),
        **({"hint": "; ".join(hints)} if hints else {}),
        **({"router": aux_loss} if aux_loss else {}),
    }


def _steps(run: Preparation) -> dict[str, str]:
    """Return lines about the steps on data files, and the tokens and padding of their batches."""
    loader = run.train_loader
    n_steps, epoch = loader.total_steps, loader.epoch_size
    tokens, cells = _batch_sizes(loader)
    n_targets = run.data.train.per_example(_n_targets, np.add)[loader.order(0)].sum()
    return {
        "steps": f"{n_steps:,} of {run.config.total_batch_size:,} examples, "
        f"{n_steps / loader.steps_per_epoch:.2f} epochs of {epoch:,} examples",
        "tokens": f"{tokens / loader.steps_per_epoch:,.0f} per step, {tokens:,} per epoch; "
        f"{_percent(n_targets, tokens)} targets",
        "padding": _padding(run, 1 - tokens / cells),
    }


def _caches(run: Preparation) -> list[TokenCache]:
    """Return the caches of the training and of the evaluation, each once."""
    caches = [cache for loader in run.loaders for cache in loader.examples.caches]
    return list({id(cache): cache for cache in caches}.values())


def _fields(caches: list[TokenCache]) -> dict[str, str]:
    """Return a line per file about what its rows have besides text, and about keys that nothing reads."""
    lines = {}
    for name, describe in (("fields", describe_fields), ("unused keys", describe_unread)):
        texts = [f"{cache.source}: {text}" for cache in caches if (text := describe(cache.counts))]
        lines |= {name: "\n".join(texts)} if texts else {}
    return lines


def _left_out(caches: list[TokenCache]) -> str:
    """Return how many rows were truncated and left out, with their fraction of all rows."""
    counts: dict[str, int] = {}
    for name, count in (pair for cache in caches for pair in cache.counts.items()):
        counts[name] = counts.get(name, 0) + count
    return "; ".join(describe_counts(counts, sum(cache.n_rows for cache in caches))) or "nothing"


def _padding(run: Preparation, fraction: float) -> str:
    """Return the fraction of padding without and with packing; `fraction` is that of the config."""
    packing, percent = run.config.packing, {}
    percent[packing] = f"{100 * fraction:.1f}%"
    if packing or not is_encoder(run.policy.model):  # an encoder needs a row for each document
        config, policy = dataclasses.replace(run.config, packing=not packing), run.meta_policy(packing=not packing)
        tokens, cells = _batch_sizes(make_loader(run.data.train, config, run.template.tokenizer, policy))
        percent[not packing] = _percent(cells - tokens, cells)
    note = f"; {run.packing_note}" if run.packing_note else ""
    return f"{percent[False]} without packing" + (f", {percent[True]} with it{note}" if True in percent else "")


def _batch_sizes(loader: MicrobatchLoader) -> tuple[int, int]:
    """Return the number of tokens and of positions in all batches of the first epoch, without building them."""
    widths = list(loader.widths(rows for step in loader.epoch_plan() for local in step for rows in local))
    return sum(map(sum, widths)), sum(len(each) * max(each, default=0) for each in widths)


def _percent(part: float, total: float) -> str:
    return f"{100 * part / total:.1f}%"


# ---------------------------------------------------------------------------------------------------------- memory


def _memory(run: Preparation, device: torch.device, devices: int = 1) -> dict[str, str]:
    """Return the estimate or why it is missing, and a warning if the device has less memory."""
    try:
        memory = estimate_memory(run, device, devices)
    except MinitrainError:
        raise
    except Exception as error:  # a model may need the values of its tensors
        return {"peak memory": f"unknown, since the model cannot run without values: {first_line(error)}"}
    where = device.type + (f" on each of {devices}" if devices > 1 else "")
    lines, peak = {"peak memory": _describe_memory(memory, where)}, memory.peak
    if run.loss.online:
        lines["sampling"] = describe_sampling(run.data.train, run.config, run.policy)
    if memory.sampling is not None:
        lines["sampling"] = f"{_describe_memory(memory.sampling, where)}; {lines['sampling']}"
        peak = max(peak, memory.sampling.peak)
    if memory.judging is not None:
        lines["judging"] = _describe_memory(memory.judging, where)
        peak = max(peak, memory.judging.peak)
    available, name = _capacity(device)
    needed = peak * (devices if device.type != "cuda" else 1)
    if needed > available:
        lines["warning"] = f"the peak memory of {_mib(needed)} MiB is more than the {_mib(available)} MiB of {name}"
    if run.config.activation_checkpointing == "none" and (device.type == "cuda" or needed > available):
        lines["recompute"] = _describe_recomputation(run, device, devices)
    return lines


def _describe_recomputation(run: Preparation, device: torch.device, devices: int) -> str:
    """Return the peak memory of a step with each way to recompute activations."""
    peaks = []
    for mode in ("selective", "full"):
        config = dataclasses.replace(run.config, activation_checkpointing=mode)
        memory = estimate_memory(dataclasses.replace(run, config=config), device, devices)
        peaks.append(f"activation_checkpointing={mode} {_mib(memory.peak)} MiB")
    return f"peak memory with {', '.join(peaks)}"


def _describe_memory(memory: MemoryEstimate, where: str) -> str:
    parts = ", ".join(
        f"{part} {_mib(size)}{' (on the CPU)' if part in memory.elsewhere else ''}"
        for part, size in memory.parts.items()
    )
    return f"{_mib(memory.peak)} MiB on {where}; peak of each part: {parts}"


def _capacity(device: torch.device) -> tuple[float, str]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], torch.cuda.get_device_name(device)
    return total_memory() or math.inf, "this machine"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size >= 10 << 20 else f"{size / 2**20:.1f}"
