"""What can be known of a training before it starts, and what is wrong with its data: `minitrain validate`."""

from collections.abc import Callable, Iterator

import numpy as np

from .data.cache import BAD_ROWS, TokenCache
from .data.loader import Examples, Loader
from .data.records import Conversation, assistant, user
from .data.template import Template
from .dry import DryRun, dry_run
from .errors import DataError
from .model.scoring import is_encoder
from .schema import Config

MAX_TOLD = 3  # rows of one kind of fault and file


def validate(config: Config) -> dict[str, str]:
    """Figures of a training by their names, from every row of its files and from its model's config.

    Raises ConfigError, or DataError for rows that cannot be read or would teach something else than they say.
    """
    run = dry_run(config)
    caches = [*run.data.train.caches, *(run.data.eval.caches if run.data.eval else [])]
    told = [line for cache in {id(cache): cache for cache in caches}.values() for line in faults(cache, run)]
    if told:
        raise DataError("\n".join(told))
    return _figures(run)


# ----------------------------------------------------------------------------------------------------------- faults


def faults(cache: TokenCache, run: DryRun) -> Iterator[str]:
    """What is wrong with rows of a file, each line naming one."""
    kind, template = run.loss.record, run.template
    checks: list[tuple[np.ndarray, str]] = []  # documents, and what is wrong with them
    if kind == "labelled":
        checks.append((np.flatnonzero(np.isnan(cache.values["label"])), "has no label"))
    else:
        checks.append((np.flatnonzero(_n_learned(cache) == 0), "has no token to learn"))
    if kind not in ("labelled", "rollout"):  # a rollout may end where its sampling was cut off
        told = f"a learned answer does not end its turn (with {_named(template)}), so a model would not learn to stop"
        checks.append((_without_end(cache, template.end_ids(), run.config.max_length), told))
    checks.append(
        (
            _with_second_bos(cache, template, run.config.max_length),
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


def _with_second_bos(cache: TokenCache, template: Template, max_length: int) -> np.ndarray:
    """Documents with a BOS behind the first one; at once behind it, where the template itself begins turns with it."""
    bos = template.tokenizer.bos_token_id
    if bos is None or bos in template.end_ids():
        return np.empty(0, np.int64)
    places = np.flatnonzero(cache.ids.numpy() == bos)
    documents = _document_of(cache, places)
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


def _figures(run: DryRun) -> dict[str, str]:
    train, held = run.data.train, run.data.eval
    loader = run.loader(train)
    n_steps, epoch = loader.total_steps, loader.epoch_size
    tokens, cells = _laid_out(loader)
    lengths = _of_documents(train, lambda cache: np.diff(cache.offsets))  # [E, n]
    learned = _of_documents(train, _n_learned).sum(1)[loader.order(0)].sum()
    half, most, nearly_all = (int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 99))
    parameters = list(run.policy.parameters())
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
        "parameters": f"{trained:,} of {sum(p.numel() for p in parameters):,} trained",
    }


def _left_out(caches: list[TokenCache]) -> str:
    """What was cut and left out, with its share of all rows."""
    counts: dict[str, int] = {}
    for what, count in (pair for cache in caches for pair in cache.counts.items()):
        counts[what] = counts.get(what, 0) + count
    lost = sum(count for what, count in counts.items() if what == BAD_ROWS or "left out" in what)
    n_rows = sum(map(len, caches)) + lost
    shares = {what: "" if "turns" in what else f" ({_share(count, n_rows)})" for what, count in counts.items()}
    return "; ".join(f"{count:,} {what}{shares[what]}" for what, count in counts.items()) or "nothing"


def _padding(run: DryRun, share: float) -> str:
    """The share of places that hold nothing, as the config lays rows out and otherwise."""
    packing, told = run.config.packing, {}
    told[packing] = f"{100 * share:.1f} %"
    if packing or not (run.policy.prompted or is_encoder(run.policy.model)):  # these need a row for each document
        tokens, cells = _laid_out(run.with_packing(not packing).loader(run.data.train))
        told[not packing] = _share(cells - tokens, cells)
    return f"{told[False]} without packing" + (f", {told[True]} with it" if True in told else "")


def _laid_out(loader: Loader) -> tuple[int, int]:
    """(tokens, places for tokens) of all batches of the first epoch, without making them."""
    whole = _of_documents(loader.examples, lambda cache: np.diff(cache.offsets))  # [E, n]
    own = whole - _of_documents(loader.examples, lambda cache: cache.shared) if loader.shares_prompts else whole
    order, size = loader.order(0), loader.config.total_batch_size
    tokens = cells = 0
    for start in range(0, len(order), size):
        for rows in loader.layout(order[start : start + size]):
            if loader.config.packing:
                widths = [int(own[row].sum()) for row in rows]
            else:
                widths = own[[example for row in rows for example in row]].reshape(-1).tolist()
            tokens += sum(widths)
            cells += len(widths) * max(widths, default=0)
    return tokens, cells


def _of_documents(examples: Examples, numbers: Callable[[TokenCache], np.ndarray]) -> np.ndarray:
    """A number of each document of the chosen examples -> [E, n]."""
    pairs = zip(examples.caches, examples.chosen, strict=True)
    return np.concatenate([numbers(cache).reshape(-1, cache.n_documents)[chosen] for cache, chosen in pairs])


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %"
