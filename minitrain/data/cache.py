"""Token ids of a data file: made once by several processes, kept in a memory-mapped safetensors file.

The file's name is a hash of all that determines its content (the bytes of the data file, the tokenizer, the
template, the options), so nothing stale is ever read. Its tensors:

    offsets         [D + 1] int64, where each of the D documents begins
    lines           [E] int64, where each of the E examples stands in the data file
    shared          [D] int32, how many of its tokens are those of the document before it, of the same example
    values/NAME     [D] float64, numbers that belong to a document
    ids             [sum of lengths] int32
    mask            [sum of lengths] uint8, 1 where the token is learned
    columns/NAME    [sum of lengths] float32, numbers that belong to a token

and its metadata holds the counts that are told at each start, the documents of an example, names of labels, and a
checksum that is compared whenever a cache is opened.
"""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from minitrain.batch import Document
from minitrain.config.schema import Config, DatasetConfig
from minitrain.errors import DataError
from minitrain.io.checksum import is_intact
from minitrain.io.redact import redact

from .cache_writer import new_cache
from .encode import ALIKE, EXCLUDED, N_DOCUMENTS, NOTHING_LEFT, TOO_LONG, TruncationConfig, encode
from .examples import format_sources, to_record
from .files import Row
from .source import Source, open_source, row_name
from .template import Template, Tokens

FORMAT = 10  # raise it when the same inputs give other tokens; row formats are in the key by themselves
CHUNK_ROWS = 256
SMALL_FILE_BYTES = 4 << 20  # below it, starting processes takes longer than it saves
BAD_ROWS = "bad-rows"  # the count that max_bad_rows limits
# What is counted of a file -> how it is reported.
LEFT_OUT = {
    BAD_ROWS: "bad rows left out",
    TOO_LONG: "examples left out (too long)",
    NOTHING_LEFT: "examples left out (nothing to learn after truncation)",
    ALIKE: "examples left out (chosen and rejected are the same after truncation)",
}
COUNTED = LEFT_OUT | {
    "truncated": "truncated examples",
    "unlearned-turns": "unlearned turns",
    "long-rollouts": "rollouts longer than max_length, not trained on",
    "truncated-rollouts": "truncated rollouts, not trained on",
}


@dataclass
class Encoder:
    """Rows -> tokens, with everything that determines them."""

    dataset: DatasetConfig
    template: Template
    limits: TruncationConfig
    kind: str  # of the records

    def __call__(self, rows: list[Row]) -> "Chunk":
        chunk = Chunk([], [], [], [])
        for line, row in rows:
            try:
                if isinstance(row, DataError):
                    raise row
                record = to_record(row, self.dataset, self.kind)
                documents = encode(record, self.template, self.limits)
            except DataError as error:
                chunk.bad.append((len(chunk.examples), line, error))
                continue
            if isinstance(documents, str):
                chunk.notes.append((len(chunk.examples), {documents: 1}))
                continue
            counts: dict[str, int] = {}
            for document in documents:
                counts |= {note: max(n, counts.get(note, 0)) for note, n in document.notes.items()}
            if counts:
                chunk.notes.append((len(chunk.examples), counts))
            chunk.examples.append([_as_arrays(document) for document in documents])
            chunk.lines.append(line)
        return chunk

    def key(self, source: Source) -> str:
        """A hash of the data and of all options that change their tokens."""
        tokenizer, entry = self.template.tokenizer, dataclasses.asdict(self.dataset)
        settings = {
            "format": FORMAT,
            "dataset": {k: v for k, v in entry.items() if k not in ("path", "weight")},
            "suffix": "".join(Path(self.dataset.path).suffixes[-2:]),
            "kind": self.kind,
            "row_formats": format_sources(self.kind, self.dataset.type),
            **self.limits._asdict(),
            "train_on": self.template.train_on,
            "chat_template": tokenizer.chat_template,
            "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self.template.backend.to_str().encode())
        for block in source.content():
            digest.update(block)
        return digest.hexdigest()[:32]


@dataclass
class Chunk:
    """What one process made of some rows. `bad` holds (good examples before it, line, error), `notes` (good
    examples before it, what is counted of it)."""

    examples: list[list[Tokens]]  # the documents of each, as arrays
    lines: list[int]  # of each
    bad: list[tuple[int, int, DataError]]
    notes: list[tuple[int, dict[str, int]]]


def _as_arrays(document: Tokens) -> Tokens:
    """The same in arrays, which travel between processes more quickly."""
    columns = {name: np.asarray(column, np.float32) for name, column in document.token_features.items()}
    ids, mask = np.asarray(document.ids, np.int32), np.asarray(document.mask, np.uint8)
    return dataclasses.replace(document, ids=ids, mask=mask, token_features=columns)


class TokenCache:
    """The examples of one data file, read lazily from the memory-mapped file.

    `doc_features` and `token_features` may be added to.
    """

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = file.metadata()
        self.ids, self.mask = tensors.pop("ids"), tensors.pop("mask")
        self.offsets, self.shared = tensors.pop("offsets").numpy(), tensors.pop("shared").numpy()
        self.lines = tensors.pop("lines").numpy()  # [E] in the data file
        named = [(*name.split("/"), tensor) for name, tensor in tensors.items()]
        self.doc_features: dict[str, np.ndarray] = {name: t.numpy() for kind, name, t in named if kind == "values"}
        excluded = self.doc_features.pop(EXCLUDED, np.zeros(len(self.offsets) - 1))  # [D]
        self.token_features: dict[str, Tensor] = {name: t for kind, name, t in named if kind == "columns"}
        self.counts: dict[str, int] = json.loads(metadata["counts"])  # by the keys of COUNTED
        self.labels: list[str] = json.loads(metadata["labels"])  # what the numbers in doc_features["label"] stand for
        self.n_documents = int(metadata["n_documents"])  # of each example
        self.trained = np.flatnonzero(excluded[:: self.n_documents] == 0)  # examples that are trained on

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.n_documents

    @property
    def n_rows(self) -> int:
        """Rows that its examples were made of, with those that were left out."""
        return len(self) + sum(count for what, count in self.counts.items() if what in LEFT_OUT)

    @property
    def key(self) -> str:
        """A hash of all that determines the tokens."""
        return self.path.stem

    @property
    def bounds(self) -> np.ndarray:
        """Where the tokens of each example begin, and of the last one end -> [E + 1]."""
        return self.offsets[:: self.n_documents]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, those that its documents share counted once -> [E]."""
        return (np.diff(self.offsets) - self.shared).reshape(-1, self.n_documents).sum(1)

    def __getitem__(self, index: int) -> list[Document]:
        """The documents of one example."""
        first = index * self.n_documents
        return [self._document(number) for number in range(first, first + self.n_documents)]

    def _document(self, number: int) -> Document:
        span = slice(self.offsets[number], self.offsets[number + 1])
        values = {name: float(column[number]) for name, column in self.doc_features.items()}
        columns = {name: column[span] for name, column in self.token_features.items()}
        return Document(self.ids[span], self.mask[span], int(self.shared[number]), values, columns)


def load_cache(dataset: DatasetConfig, template: Template, config: Config, kind: str = "conversation") -> TokenCache:
    """The tokens of a data file, from the cache or made now. Raises DataError for a bad row, an empty file, or
    a cache folder that cannot be written."""
    limits = TruncationConfig(config.max_length, config.truncation, config.max_prompt_length, config.mask_truncated)
    encoder = Encoder(dataset, template, limits, kind)
    folder = cache_folder(config)
    try:
        source = open_source(dataset)
        path = folder / f"{encoder.key(source)}.safetensors"
    except OSError as error:
        raise DataError(f"{dataset.path}: cannot be read: {error.strerror}", "unreadable") from None
    cache = usable_cache(path, source.name, config)
    if cache is None:
        try:
            _build(path, encoder, source, config)
        except BrokenProcessPool:
            raise DataError(
                f"{source.name}: a process that tokenised it was killed. Set a lower num_proc.", "process-failed"
            ) from None
        cache = TokenCache(path, source.name)
    if len(cache.trained) == 0:
        told = "; ".join(f"{count} {COUNTED[what]}" for what, count in cache.counts.items())
        raise DataError(f"{source.name}: no example can be trained on ({told or 'the file has no rows'})", "no-data")
    return cache


def cache_folder(config: Config) -> Path:
    """Where tokens are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitrain"
    return Path(config.cache_dir) if config.cache_dir else default


def usable_cache(path: Path, source: str, config: Config) -> TokenCache | None:
    """The cache, unless it is missing, damaged, or was made with more bad rows than are allowed now."""
    if not path.exists():
        return None
    try:
        if not is_intact(path):
            raise OSError(None, "its checksum is not right")
        cache = TokenCache(path, source)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        tqdm.write(f"{path}: the tokens of {redact(source)} are damaged ({reason}), and are made again [damaged-file]")
        return None
    allowed = config.max_bad_rows if config.on_bad_row == "skip" else 0
    return cache if cache.counts.get(BAD_ROWS, 0) <= allowed else None


def _build(path: Path, encoder: Encoder, source: Source, config: Config) -> None:
    """Streams the rows through the processes into raw files, then joins these into one safetensors file."""
    wanted = encoder.dataset.n_examples or sys.maxsize
    n_examples, counts = 0, Counter()
    with new_cache(path, source.name) as writer:
        for chunk in _encoded(encoder, source, config):
            _enforce_bad_row_limit(chunk, n_examples, wanted, source.name, config, counts)
            for before, found in chunk.notes:  # of rows behind the last one that is used, nothing is told
                counts.update(found if n_examples + before < wanted else {})
            taken = chunk.examples[: wanted - n_examples]
            n_examples += len(taken)
            for line, documents in zip(chunk.lines, taken):
                writer.add(line, documents)
            if n_examples == wanted:
                break
        writer.counts, writer.n_documents = counts, N_DOCUMENTS[encoder.kind]


def _encoded(encoder: Encoder, source: Source, config: Config) -> Iterator[Chunk]:
    """Chunks in the order of the file, made by `num_proc` processes, with a progress bar."""
    rows = source.rows()
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK_ROWS)), [])
    processes = config.num_proc or os.cpu_count() or 1
    if processes == 1 or source.size < SMALL_FILE_BYTES:
        results = map(encoder, chunks)
    else:
        results = _in_processes(encoder, chunks, processes)
    name, quiet = Path(redact(source.name)).name, config.quiet or None  # None: a bar, where there is a terminal
    with tqdm(desc=f"tokenising {name}", unit=" rows", disable=quiet, leave=False) as bar:
        for chunk in results:
            bar.update(len(chunk.examples) + len(chunk.bad))
            yield chunk


def _in_processes(encoder: Encoder, chunks: Iterator[list[Row]], processes: int) -> Iterator[Chunk]:
    # Tokenizers have threads of their own, which must not be forked while they run.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pending = deque()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (encoder,))
    try:
        for chunk in chunks:
            pending.append(pool.submit(_work, chunk))
            if len(pending) > 4 * processes:  # so that memory does not grow with the file
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent has been killed, and so never sends it another chunk."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(rows: list[Row]) -> Chunk:
    return _worker_encoder(rows)


def _enforce_bad_row_limit(chunk: Chunk, before: int, wanted: int, path: str, config: Config, counts: Counter) -> None:
    """Counts the bad rows that stand before the last wanted example; raises DataError as the config says."""
    for examples_before, line, error in chunk.bad:
        if before + examples_before >= wanted:
            return
        where = f"{row_name(path, line)}: {error.message}"
        if config.on_bad_row == "error":
            raise DataError(f"{where}. Mend the row, or leave such rows out with on_bad_row=skip.", error.code)
        counts[BAD_ROWS] += 1
        if counts[BAD_ROWS] <= 3:
            tqdm.write(f"left out {redact(where)} [{error.code}]".encode(errors="backslashreplace").decode())
        if counts[BAD_ROWS] > config.max_bad_rows:
            raise DataError(f"{where}. There are more bad rows than max_bad_rows={config.max_bad_rows}.", error.code)
