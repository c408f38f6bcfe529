"""Tokenize a data file once, in several processes, and keep the result in a memory-mapped safetensors file.

The file name is a hash of everything that determines the tokens (the data file's bytes, the tokenizer, the template and
the options), so a stale cache is never read. Tensors of a file with E examples, D documents and N tokens:

    offsets                 [D + 1] int64, index of each document's first token
    lines                   [E] int64, line of each example in the data file
    first_documents         [E + 1] int64, index of each example's first document
    shared                  [D] int32, number of leading tokens in common with the last document before it in the
                            example that has 0 here
    doc_features/NAME       [D] float64, one number per document
    ids                     [N] int32
    mask                    [N] uint8, 1 for a target
    token_features/NAME     [N] float32, one number per token

The metadata has the counts of skipped rows and truncated examples, the label names, and a checksum that is verified
when the cache is opened.
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
from minitrain.config.schema import Config
from minitrain.config.sections import DatasetConfig
from minitrain.errors import DataError
from minitrain.io.checksum import is_intact
from minitrain.io.redact import redact

from .cache_writer import new_cache
from .counts import BAD_ROWS, DROPPED, OF_ROWS
from .encode import EXCLUDED, TruncationConfig, count_example, render, tokenize
from .examples import Example, format_sources, to_example, tools_of
from .files import DataRow
from .source import DataSource, open_source, row_name
from .template import Template
from .text_encoder import RenderedDocument, Tokens

FORMAT = 16  # raise it when the same inputs give other tokens; the code of row formats is in the key already
CHUNK_ROWS = 256
SMALL_FILE_BYTES = 4 << 20  # for smaller files, starting processes takes longer than it saves


@dataclass
class Encoder:
    """Tokenizes data rows; holds everything that determines the tokens."""

    dataset: DatasetConfig
    template: Template
    limits: TruncationConfig
    kind: str  # of the examples

    def __call__(self, rows: list[DataRow]) -> "Chunk":
        rendered = [self._render(row) for _, row in rows]
        with self.template.encoder.encoding_ahead(document for _, each in rendered for document in each):
            return self._tokenize([line for line, _ in rows], rendered)

    def _render(self, row: dict | DataError) -> "RenderedExample":
        if isinstance(row, DataError):
            return row, []
        try:
            example = to_example(row, self.dataset, self.kind)
            return example, render(example, self.template)
        except DataError as error:
            return error, []

    def _tokenize(self, lines: list[int], rendered: "list[RenderedExample]") -> "Chunk":
        chunk = Chunk([], [], [], [])
        for line, (example, texts) in zip(lines, rendered, strict=True):
            try:
                if isinstance(example, DataError):
                    raise example
                documents = tokenize(example, texts, self.template, self.limits)
            except DataError as error:
                chunk.bad.append((len(chunk.examples), line, error))
                continue
            if isinstance(documents, str):
                chunk.counts.append((len(chunk.examples), {documents: 1}))
                continue
            if counts := count_example(example, documents, self.template):
                chunk.counts.append((len(chunk.examples), counts))
            chunk.examples.append([_as_arrays(document) for document in documents])
            chunk.lines.append(line)
        return chunk

    def key(self, source: DataSource) -> str:
        """Return a hash of the data and of all options that change its tokens."""
        tokenizer = self.template.tokenizer
        settings = {
            "format": FORMAT,
            "dataset": {
                k: v for k, v in dataclasses.asdict(self.dataset).items() if k not in ("path", "weight", "tools")
            },
            "suffix": "".join(Path(self.dataset.path).suffixes[-2:]),
            "kind": self.kind,
            "row_formats": format_sources(self.kind, self.dataset.type),
            **self.limits._asdict(),
            **self.template.targets._asdict(),
            "tools": tools_of(self.dataset),  # not only the path of their file
            "chat_template": self.template.renderer.source,
            "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self.template.encoder.backend.to_str().encode())
        for block in source.content():
            digest.update(block)
        return digest.hexdigest()[:32]


RenderedExample = tuple[Example | DataError, list[RenderedDocument]]


@dataclass
class Chunk:
    """The tokens of some consecutive data rows.

    Attributes:
        examples: The documents of each example, as arrays.
        lines: The line of each example.
        bad: For each bad row, (number of examples before it, line, error).
        counts: For each row with something to count, (number of examples before it, counts by key of `counts.py`).
    """

    examples: list[list[Tokens]]
    lines: list[int]
    bad: list[tuple[int, int, DataError]]
    counts: list[tuple[int, dict[str, int]]]


def _as_arrays(document: Tokens) -> Tokens:
    """Return the document with arrays, which are faster to send to another process."""
    document.ids, document.mask = np.asarray(document.ids, np.int32), np.frombuffer(bytes(document.mask), np.uint8)
    document.token_features = {name: np.asarray(each, np.float32) for name, each in document.token_features.items()}
    document.uses = {}
    return document


class TokenCache:
    """The tokenized examples of one data file, read lazily from the memory-mapped cache.

    Attributes:
        source: The data file's name, as messages show it.
        lines: Line of each example in the data file, shape [E].
        doc_features: Name -> one number per document, shape [D]. Losses may add some.
        token_features: Name -> one number per token, shape [N]. Losses may add some.
        counts: What was counted, by key of `counts.py`.
        labels: Label names; doc_features["label"] has indices into them.
        first_documents: Index of each example's first document, and the number of documents, shape [E + 1].
        trained: Indices of the examples that are trained on.
        dataset: The entry of the config with the data file; None if there is no file.
    """

    dataset: DatasetConfig | None = None

    def __init__(self, tensors: dict[str, Tensor], counts: dict[str, int], labels: list[str], source: str, path: Path):
        """
        Args:
            tensors: The tensors of a cache file; see the top of this module.
        """
        self.path, self.source, self.counts, self.labels = path, source, counts, labels
        self.ids, self.mask = tensors.pop("ids"), tensors.pop("mask")
        self.offsets, self.shared = tensors.pop("offsets").numpy(), tensors.pop("shared").numpy()
        self.lines, self.first_documents = tensors.pop("lines").numpy(), tensors.pop("first_documents").numpy()
        named = [(*name.split("/"), tensor) for name, tensor in tensors.items()]
        self.doc_features: dict[str, np.ndarray] = {
            name: tensor.numpy() for group, name, tensor in named if group == "doc_features"
        }
        excluded = self.doc_features.pop(EXCLUDED, np.zeros(len(self.offsets) - 1))  # [D]
        self.token_features: dict[str, Tensor] = {
            name: tensor for group, name, tensor in named if group == "token_features"
        }
        self.trained = np.flatnonzero(excluded[self.first_documents[:-1]] == 0)

    @classmethod
    def open(cls, path: Path, source: str) -> "TokenCache":
        """Return the cache in a file. Raises SafetensorError or OSError if it cannot be read."""
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata()
        return cls(tensors, json.loads(metadata["counts"]), json.loads(metadata["labels"]), source, path)

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def n_rows(self) -> int:
        """Number of data rows, including those skipped or dropped."""
        return len(self) + sum(count for key, count in self.counts.items() if key in DROPPED)

    @property
    def key(self) -> str:
        """Hash of everything that determines the tokens."""
        return self.path.stem

    @property
    def bounds(self) -> np.ndarray:
        """Index of each example's first token, and the end of the last example, shape [E + 1]."""
        return self.offsets[self.first_documents]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each example, with shared tokens counted once, shape [E]."""
        return np.diff(np.cumsum([0, *(np.diff(self.offsets) - self.shared)])[self.first_documents])

    def __getitem__(self, index: int) -> list[Document]:
        """Return the documents of one example."""
        return [self._document(number) for number in range(*self.first_documents[index : index + 2])]

    def _document(self, number: int) -> Document:
        span = slice(self.offsets[number], self.offsets[number + 1])
        doc_features = {name: float(feature[number]) for name, feature in self.doc_features.items()}
        token_features = {name: feature[span] for name, feature in self.token_features.items()}
        return Document(self.ids[span], self.mask[span], int(self.shared[number]), doc_features, token_features)


def load_cache(dataset: DatasetConfig, template: Template, config: Config, kind: str = "conversation") -> TokenCache:
    """Return the tokens of a data file, from its cache or by tokenizing it now.

    Args:
        kind: The kind of examples that the loss needs, a key of `EXAMPLE_COLUMNS`.

    Raises:
        DataError: The file is empty or unreadable, a row is bad, or the cache directory cannot be written.
    """
    limits = TruncationConfig(config.max_length, config.truncation, config.max_prompt_length, config.mask_truncated)
    encoder = Encoder(dataset, template, limits, kind)
    folder = cache_folder(config)
    try:
        source = open_source(dataset)
        path = folder / f"{encoder.key(source)}.safetensors"
    except OSError as error:
        raise DataError(
            f"{dataset.path}: cannot be read: {error.strerror}. Check the path and its permissions.", "unreadable"
        ) from None
    cache = usable_cache(path, source.name, config)
    if cache is None:
        try:
            _build(path, encoder, source, config)
        except BrokenProcessPool:
            raise DataError(
                f"{source.name}: a process that tokenized it was killed. Set a lower num_proc.", "process-failed"
            ) from None
        cache = TokenCache.open(path, source.name)
    if len(cache.trained) == 0:
        reasons = "; ".join(f"{count} {OF_ROWS[key]}" for key, count in cache.counts.items() if key in OF_ROWS)
        raise DataError(
            f"{source.name}: no example can be trained on ({reasons or 'the file has no rows'}). "
            "Name a file with usable rows, or change the options that limit them.",
            "no-data",
        )
    cache.dataset = dataset
    return cache


def cache_folder(config: Config) -> Path:
    """Return the directory of the token caches."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitrain"
    return Path(config.cache_dir) if config.cache_dir else default


def usable_cache(path: Path, source: str, config: Config) -> TokenCache | None:
    """Return the cache, or None if it is missing, damaged, or has more bad rows than are allowed now."""
    if not path.exists():
        return None
    try:
        if not is_intact(path):
            raise OSError(None, "checksum mismatch")
        cache = TokenCache.open(path, source)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        tqdm.write(f"{path}: damaged cache ({reason}). Tokenizing {redact(source)} again. [damaged-file]")
        return None
    allowed = config.max_bad_rows if config.on_bad_row == "skip" else 0
    return cache if cache.counts.get(BAD_ROWS, 0) <= allowed else None


def _build(path: Path, encoder: Encoder, source: DataSource, config: Config) -> None:
    """Tokenize a data file and write its cache."""
    limit = encoder.dataset.n_examples or sys.maxsize
    n_examples, counts = 0, Counter()
    with new_cache(path, source.name) as writer:
        for chunk in _iter_chunks(encoder, source, config):
            _enforce_bad_row_limit(chunk, n_examples, limit, source.name, config, counts)
            for n_before, row_counts in chunk.counts:
                if n_examples + n_before < limit:  # rows after the last example are not reported
                    counts.update(row_counts)
            examples = chunk.examples[: limit - n_examples]
            n_examples += len(examples)
            for line, documents in zip(chunk.lines, examples):
                writer.add(line, documents)
            if n_examples == limit:
                break
        writer.counts = counts


def _iter_chunks(encoder: Encoder, source: DataSource, config: Config) -> Iterator[Chunk]:
    """Yield the chunks in file order, tokenized by `num_proc` processes, with a progress bar."""
    rows = source.rows()
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK_ROWS)), [])
    processes = config.num_proc or os.cpu_count() or 1
    if processes == 1 or source.size < SMALL_FILE_BYTES:
        results = map(encoder, chunks)
    else:
        results = _in_processes(encoder, chunks, processes)
    name, quiet = Path(redact(source.name)).name, config.quiet or None  # None: show the bar on a terminal only
    with tqdm(desc=f"tokenizing {name}", unit=" rows", disable=quiet, leave=False) as bar:
        for chunk in results:
            bar.update(len(chunk.examples) + len(chunk.bad))
            yield chunk


def _in_processes(encoder: Encoder, chunks: Iterator[list[DataRow]], processes: int) -> Iterator[Chunk]:
    # The tokenizers library has its own threads, which must not be running at a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pending = deque()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (encoder,))
    try:
        for chunk in chunks:
            pending.append(pool.submit(_work, chunk))
            if len(pending) > 4 * processes:  # bounds memory
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool terminates its processes with it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent process is killed, which would leave this worker waiting forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(rows: list[DataRow]) -> Chunk:
    return _worker_encoder(rows)


def _enforce_bad_row_limit(
    chunk: Chunk, n_examples: int, limit: int, source: str, config: Config, counts: Counter
) -> None:
    """Count the bad rows before the last example in `counts`.

    Args:
        n_examples: Number of examples before the chunk.
        limit: Number of examples to use from the file.

    Raises:
        DataError: Bad rows are errors, or there are more than max_bad_rows.
    """
    for n_before, line, error in chunk.bad:
        if n_examples + n_before >= limit:
            return
        problem = f"{row_name(source, line)}: {error.message}"
        if config.on_bad_row == "error":
            raise DataError(f"{problem}. Fix the row, or skip bad rows with on_bad_row=skip.", error.code)
        counts[BAD_ROWS] += 1
        if counts[BAD_ROWS] <= 3:
            tqdm.write(f"skipped {redact(problem)} [{error.code}]".encode(errors="backslashreplace").decode())
        if counts[BAD_ROWS] > config.max_bad_rows:
            raise DataError(
                f"{problem}. This is one bad row more than max_bad_rows={config.max_bad_rows}. "
                "Fix the rows, or raise max_bad_rows.",
                error.code,
            )
