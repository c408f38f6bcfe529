"""What can be known of a training before it starts, and what is wrong with its data: `minitrain validate`."""

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from minitrain.config.schema import Config
from minitrain.data.cache import TokenCache
from minitrain.data.examples import Conversation, assistant, user
from minitrain.data.loader import MicrobatchLoader, describe_counts
from minitrain.data.template import Template
from minitrain.distributed.parallel import SingleDevice, pick_device
from minitrain.errors import DataError, MinitrainError
from minitrain.model.diagnostics import check_weights_exist, first_line, log_model_warnings
from minitrain.model.load import META, build_frozen
from minitrain.model.sequence_head import is_encoder
from minitrain.model.state_dict import read_archive
from minitrain.model.trial import check_meta_policy
from minitrain.model.vocabulary import describe_new_tokens
from minitrain.training.after_step import KNOWN_METRICS, check_metric
from minitrain.training.aux_models import build_teacher, teacher_config
from minitrain.training.checkpoint import check_checkpoint
from minitrain.training.run_dir import RunDir
from minitrain.training.saving import input_fingerprints
from minitrain.training.setup import Preparation, check_lengths, dry_run, make_loader

from .load import check_python_config
from .memory import estimate, eval_metrics

MAX_TOLD = 3  # rows of one kind of fault and file


def validate(config: Config, devices: int = 1, with_memory: bool = True) -> dict[str, str]:
    """Figures of a training by their names, from every row of its files and from its model's config.

    `with_memory`: also what it takes on each of so many devices, for which a step is tried out. Raises ConfigError, or
    DataError for rows that cannot be read or would teach something else than they say.
    """
    config = check_python_config(config)
    parallel = SingleDevice(pick_device(config.device))
    folder = RunDir(config, parallel)
    run = dry_run(config)
    warnings = run.data.warnings + _try_out(run) + _try_resuming(run, folder)
    _check_metric(run)
    caches = [*run.data.train.caches, *(run.data.eval.caches if run.data.eval else [])]
    told = [line for cache in {id(cache): cache for cache in caches}.values() for line in faults(cache, run)]
    if told:
        raise DataError("\n".join(told), "wrong-tokens")
    figures = _figures(run) | (_memory(run, parallel.device, devices) if with_memory else {})
    if "warning" in figures:
        warnings.append(figures.pop("warning"))
    return figures | ({"warning": "; ".join(warnings)} if warnings else {})


def _try_out(run: Preparation) -> list[str]:
    """Try what training tries between the data and the first step, and return warnings. Raises ConfigError."""
    config, tokenizer = run.config, run.template.tokenizer
    check_weights_exist(config.model, run.loss.head_labels)
    log_model_warnings(config.model.name_or_path, run.policy.model.load_notes)
    if config.model.archive:
        read_archive(run.policy.model, Path(config.model.archive))
    warnings = check_meta_policy(run.meta_policy(), config.packing)
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
    """Try what training tries with its run directory and its checkpoint, and return warnings. Raises RunDirError."""
    if finished := folder.finished(run.train_loader.total_steps):
        return [*folder.messages, finished]
    checkpoint = folder.find_checkpoint()
    if checkpoint is not None:
        state = check_checkpoint(checkpoint, run.policy)
        folder.check_fingerprints(checkpoint, state["inputs"], input_fingerprints(run.config, run.data.train))
    return folder.messages


def _check_metric(run: Preparation) -> None:
    """Raise ConfigError when the evaluation does not have the metric that decides, as far as can be known."""
    metric = run.config.early_stopping.metric
    if run.data.eval is None or metric in KNOWN_METRICS:
        return
    try:
        known = eval_metrics(run)
    except MinitrainError:
        raise
    except Exception:  # whatever a model may do that needs the values of its tensors
        return
    check_metric(metric, known)


# ----------------------------------------------------------------------------------------------------------- faults


def faults(cache: TokenCache, run: Preparation) -> Iterator[str]:
    """What is wrong with rows of a file, each line naming one."""
    kind, template = run.loss.example_type, run.template
    checks: list[tuple[np.ndarray, str]] = []  # documents, and what is wrong with them
    if kind == "classification":
        checks.append((np.flatnonzero(np.isnan(cache.doc_features["label"])), "has no label"))
    else:
        checks.append((np.flatnonzero(_n_learned(cache) == 0), "has no token to learn"))
    if kind not in ("classification", "rollout"):  # a rollout may end where its sampling was cut off
        told = f"a learned answer does not end its turn (with {_named(template)}), so a model would not learn to stop"
        documents = _without_end(cache, template.end_ids(), run.config.max_length)
        # Of feedback only the judged answer is learned; the other one may be of a row whose end was cut.
        checks.append((documents[documents % 2 == 0] if kind == "unpaired_preference" else documents, told))
    checks.append(
        (
            _with_second_bos(cache, kind, template, run.config.max_length),
            f"has more than one {template.tokenizer.bos_token!r}",
        )
    )
    for documents, told in checks:
        examples = np.unique(documents // cache.n_documents)
        for line in cache.lines[examples[:MAX_TOLD]]:
            yield f"{cache.source}:{line}: {told}."
        if len(examples) > MAX_TOLD:
            yield f"{cache.source}: so in {len(examples) - MAX_TOLD:,} more of {len(cache):,} examples."


def _named(template: Template) -> str:
    return " or ".join(map(repr, template.tokenizer.convert_ids_to_tokens(template.end_ids())))


def _without_end(cache: TokenCache, end_ids: list[int], max_length: int) -> np.ndarray:
    """Documents with learned tokens that stop at another one than an end; those that were cut there are none."""
    mask = cache.mask.numpy()  # [T]
    # The last token of each run: a document's first token is never learned, so no run goes on in the next one.
    last = np.flatnonzero(mask > np.append(mask[1:], np.uint8(0)))
    last = last[~np.isin(cache.ids.numpy()[last], end_ids)]
    documents = _document_of(cache, last)
    stop = cache.offsets[documents + 1]
    cut = (last + 1 == stop) & (stop - cache.offsets[documents] == max_length)
    return documents[~cut]


def _with_second_bos(cache: TokenCache, kind: str, template: Template, max_length: int) -> np.ndarray:
    """Documents with a BOS behind the first one; at once behind it, where the template itself begins turns with it."""
    bos = template.tokenizer.bos_token_id
    if bos is None or bos in template.end_ids():
        return np.empty(0, np.int64)
    places = np.flatnonzero(cache.ids.numpy() == bos)
    documents = _document_of(cache, places)
    if kind == "classification":  # read as the tokenizer itself writes a text or a pair of them
        allowed = template.tokenizer("a", "b")["input_ids"].count(bos)
        found, counts = np.unique(documents, return_counts=True)
        return found[counts > max(1, allowed)]
    start = cache.offsets[documents]
    if _begins_turns(bos, template):
        cut = cache.offsets[documents + 1] - start == max_length  # truncation keeps the first BOS, before any turn
        return documents[(places == start + 1) & (cache.ids.numpy()[start] == bos) & ~cut]
    return documents[places > start]


def _begins_turns(bos: int, template: Template) -> bool:
    try:
        return bos in template.encode(Conversation([user("a"), assistant("b")] * 2)).ids[1:]
    except DataError:  # it refuses the conversation
        return False


def _n_learned(cache: TokenCache) -> np.ndarray:
    """Learned tokens of each document -> [D]."""
    return np.add.reduceat(cache.mask.numpy(), cache.offsets[:-1], dtype=np.int64)


def _document_of(cache: TokenCache, places: np.ndarray) -> np.ndarray:
    return np.searchsorted(cache.offsets, places, side="right") - 1


# ---------------------------------------------------------------------------------------------------------- figures


def _figures(run: Preparation) -> dict[str, str]:
    train, held = run.data.train, run.data.eval
    loader = run.train_loader
    n_steps, epoch = loader.total_steps, loader.epoch_size
    tokens, cells = _laid_out(loader)
    lengths = train.per_document(lambda cache: np.diff(cache.offsets))  # [E, n]
    learned = train.per_document(_n_learned).sum(1)[loader.order(0)].sum()
    half, most, nearly_all = (int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99))
    parameters, new = list(run.policy.parameters()), describe_new_tokens(run.policy.model, run.template.tokenizer)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return {
        "examples": f"{len(train):,} to train on" + (f", {len(held):,} to evaluate on" if held else ""),
        "left out": _left_out(train.caches),
        "lengths": f"half of the texts up to {half:,} tokens, 90 % up to {most:,}, 99 % up to {nearly_all:,}, "
        f"the longest {lengths.max():,}; max_length {run.config.max_length:,}",
        "steps": f"{n_steps:,} of {run.config.total_batch_size:,} examples, "
        f"{n_steps / loader.steps_per_epoch:.2f} epochs of {epoch:,} examples",
        "tokens": f"{tokens / loader.steps_per_epoch:,.0f} a step, {tokens:,} an epoch; "
        f"{_share(learned, tokens)} learned",
        "padding": _padding(run, 1 - tokens / cells),
        **({"new tokens": new} if new else {}),
        "parameters": f"{trained:,} of {sum(p.numel() for p in parameters):,} trained",
    }


def _left_out(caches: list[TokenCache]) -> str:
    """What was cut and left out, with its share of all rows."""
    counts: dict[str, int] = {}
    for what, count in (pair for cache in caches for pair in cache.counts.items()):
        counts[what] = counts.get(what, 0) + count
    return "; ".join(describe_counts(counts, sum(cache.n_rows for cache in caches))) or "nothing"


def _padding(run: Preparation, share: float) -> str:
    """The share of places that hold nothing, as the config lays rows out and otherwise."""
    packing, told = run.config.packing, {}
    told[packing] = f"{100 * share:.1f} %"
    if packing or not (
        run.policy.has_soft_prompt or is_encoder(run.policy.model)
    ):  # these need a row for each document
        config, policy = dataclasses.replace(run.config, packing=not packing), run.meta_policy(packing=not packing)
        tokens, cells = _laid_out(make_loader(run.data.train, config, run.template.tokenizer, policy))
        told[not packing] = _share(cells - tokens, cells)
    return f"{told[False]} without packing" + (f", {told[True]} with it" if True in told else "")


def _laid_out(loader: MicrobatchLoader) -> tuple[int, int]:
    """(tokens, places for tokens) of all batches of the first epoch, without making them."""
    widths = list(loader.widths(rows for step in loader.epoch_plan() for mine in step for rows in mine))
    return sum(map(sum, widths)), sum(len(each) * max(each, default=0) for each in widths)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"


# ---------------------------------------------------------------------------------------------------------- memory


def _memory(run: Preparation, device: torch.device, devices: int = 1) -> dict[str, str]:
    """The estimate in words, or why there is none, and a warning where the device has less."""
    try:
        found = estimate(run, device, devices)
    except MinitrainError:
        raise
    except Exception as error:  # whatever a model may do that needs the values of its tensors
        return {"peak memory": f"not known, since the model cannot run without values: {first_line(error)}"}
    each = f" on each of {devices}" if devices > 1 else ""
    parts = ", ".join(
        f"{part} {_mib(size)}{' (on the CPU)' if part in found.elsewhere else ''}" for part, size in found.parts.items()
    )
    told = {"peak memory": f"{_mib(found.peak)} MiB on {device.type}{each}; at most, not all at once: {parts}"}
    there, what = _capacity(device)
    needed = found.peak * (devices if device.type != "cuda" else 1)
    if needed > there:
        told["warning"] = f"the peak memory of {_mib(needed)} MiB is more than the {_mib(there)} MiB of {what}"
    return told


def _capacity(device: torch.device) -> tuple[int, str]:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], torch.cuda.get_device_name(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size >= 10 << 20 else f"{size / 2**20:.1f}"
