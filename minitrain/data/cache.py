"""Token ids of a data file: made once by several processes, kept in a memory-mapped safetensors file.

The file's name is a hash of all that determines its content (the bytes of the data file, the tokenizer, the
template, the options), so nothing stale is ever read. Its tensors:

    offsets  [D + 1] int64, where each of the D documents begins
    ids      [sum of lengths] int32
    mask     [sum of lengths] uint8, 1 where the token is learned

and its metadata holds the counts that are told at each start.
"""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from ..errors import DataError
from ..schema import Config, DatasetConfig
from .files import Row, read_rows
from .records import to_record
from .template import Template, truncate

FORMAT = 2  # raise it when the same inputs give other tokens
CHUNK_ROWS = 256
SMALL_FILE_BYTES = 4 << 20  # below it, starting processes takes longer than it saves
BAD_ROWS = "bad rows left out"  # the count that max_bad_rows limits
UNFINISHED = ".building-"  # how the folders begin in which caches are made


@dataclass
class Encoder:
    """Rows -> tokens, with everything that determines them."""

    dataset: DatasetConfig
    template: Template
    max_length: int
    truncation: str

    def __call__(self, rows: list[Row]) -> "Chunk":
        chunk = Chunk([], [], [], [], Counter())
        bos = self.template.tokenizer.bos_token_id
        for line, row in rows:
            try:
                if isinstance(row, DataError):
                    raise row
                tokens = self.template.encode(to_record(row, self.dataset))
            except DataError as error:
                chunk.bad.append((len(chunk.lengths), line, str(error)))
                continue
            kept = truncate(tokens, self.max_length, self.truncation, bos)
            if kept is None:
                reason = "too long" if self.truncation == "drop" else "nothing to learn after truncation"
                chunk.counts[f"examples left out ({reason})"] += 1
                continue
            chunk.counts.update(kept.notes)
            chunk.ids.append(np.asarray(kept.ids, np.int32))
            chunk.mask.append(np.asarray(kept.mask, np.uint8))
            chunk.lengths.append(len(kept.ids))
        return chunk

    def key(self) -> str:
        """A hash of the data file and of all options that change its tokens."""
        tokenizer, entry = self.template.tokenizer, asdict(self.dataset)
        settings = {
            "format": FORMAT,
            "dataset": {k: v for k, v in entry.items() if k not in ("path", "weight")},
            "suffix": "".join(Path(self.dataset.path).suffixes[-2:]),
            "max_length": self.max_length,
            "truncation": self.truncation,
            "train_on": self.template.train_on,
            "chat_template": tokenizer.chat_template,
            "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self.template.backend.to_str().encode())
        with open(self.dataset.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()[:32]


@dataclass
class Chunk:
    """What one process made of some rows. `bad` holds (good documents before it, line, reason)."""

    ids: list[np.ndarray]
    mask: list[np.ndarray]
    lengths: list[int]
    bad: list[tuple[int, int, str]]
    counts: Counter


class TokenCache:
    """The documents of one data file, read lazily from the memory-mapped file."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            self.ids, self.mask = file.get_tensor("ids"), file.get_tensor("mask")
            self.offsets = file.get_tensor("offsets").numpy()
            self.counts: dict[str, int] = json.loads(file.metadata()["counts"])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(ids [T] int32, mask [T] uint8) of one document."""
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.mask[span]


def load_cache(dataset: DatasetConfig, template: Template, config: Config) -> TokenCache:
    """The tokens of a data file, from the cache or made now. Raises DataError for a bad row, an empty file, or
    a cache folder that cannot be written."""
    encoder = Encoder(dataset, template, config.max_length, config.truncation)
    folder = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
    try:
        path = folder / f"{encoder.key()}.safetensors"
    except OSError as error:
        raise DataError(f"{dataset.path}: cannot be read: {error.strerror}") from None
    cache = _usable_cache(path, config)
    if cache is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_debris(folder)
            _build(path, encoder, config)
        except OSError as error:
            raise DataError(f"{folder}: the tokens cannot be kept there: {error.strerror}. Set cache_dir.") from None
        except BrokenProcessPool:
            raise DataError(f"{dataset.path}: a process that tokenised it was killed. Set a lower num_proc.") from None
        cache = TokenCache(path)
    if len(cache) == 0:
        told = "; ".join(f"{count} {what}" for what, count in cache.counts.items())
        raise DataError(f"{dataset.path}: no example can be trained on ({told or 'the file has no rows'})")
    return cache


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitrain"


def _usable_cache(path: Path, config: Config) -> TokenCache | None:
    """The cache, unless it is missing, damaged, or was made with more bad rows than are allowed now."""
    if not path.exists():
        return None
    try:
        cache = TokenCache(path)
    except (SafetensorError, OSError):
        return None
    allowed = config.max_bad_rows if config.on_bad_row == "skip" else 0
    return cache if cache.counts.get(BAD_ROWS, 0) <= allowed else None


def _remove_debris(folder: Path) -> None:
    """Removes what a killed process left; younger than a day, it may belong to a run that still works on it."""
    for unfinished in folder.glob(UNFINISHED + "*"):
        with contextlib.suppress(OSError):  # another process may be removing it too
            if unfinished.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(unfinished)


def _build(path: Path, encoder: Encoder, config: Config) -> None:
    """Streams the rows through the processes into raw files, then joins these into one safetensors file."""
    wanted = encoder.dataset.n_examples or sys.maxsize
    lengths, counts = array("q"), Counter()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        folder = Path(folder)
        with open(folder / "ids", "wb") as ids, open(folder / "mask", "wb") as mask:
            for chunk in _encoded(encoder, config):
                _judge_bad_rows(chunk, len(lengths), wanted, encoder.dataset.path, config, counts)
                counts.update(chunk.counts)
                for some_ids, some_mask in itertools.islice(zip(chunk.ids, chunk.mask), wanted - len(lengths)):
                    ids.write(some_ids.tobytes())
                    mask.write(some_mask.tobytes())
                    lengths.append(len(some_ids))
                if len(lengths) == wanted:
                    break
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        (folder / "offsets").write_bytes(offsets.tobytes())
        n_tokens = int(offsets[-1])
        # The widest first, so that each is aligned.
        shapes = {"offsets": ("I64", [len(offsets)]), "ids": ("I32", [n_tokens]), "mask": ("U8", [n_tokens])}
        _join_safetensors(folder / "joined", folder, shapes, {"counts": json.dumps(counts)})
        os.replace(folder / "joined", path)


def _encoded(encoder: Encoder, config: Config) -> Iterator[Chunk]:
    """Chunks in the order of the file, made by `num_proc` processes, with a progress bar."""
    path = Path(encoder.dataset.path)
    rows = read_rows(path)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK_ROWS)), [])
    processes = config.num_proc or os.cpu_count() or 1
    if processes == 1 or path.stat().st_size < SMALL_FILE_BYTES:
        results = map(encoder, chunks)
    else:
        results = _in_processes(encoder, chunks, processes)
    with tqdm(desc=f"tokenising {path.name}", unit=" rows", disable=None, leave=False) as bar:
        for chunk in results:
            bar.update(len(chunk.lengths) + len(chunk.bad))
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


def _work(rows: list[Row]) -> Chunk:
    return _worker_encoder(rows)


def _judge_bad_rows(chunk: Chunk, before: int, wanted: int, path: str, config: Config, counts: Counter) -> None:
    """Counts the bad rows that stand before the last wanted document; raises DataError as the config says."""
    for documents_before, line, reason in chunk.bad:
        if before + documents_before >= wanted:
            return
        where = f"{path}:{line}: {reason}"
        if config.on_bad_row == "error":
            raise DataError(f"{where}. Mend the row, or leave such rows out with on_bad_row=skip.")
        counts[BAD_ROWS] += 1
        if counts[BAD_ROWS] <= 3:
            tqdm.write(f"left out {where}")
        if counts[BAD_ROWS] > config.max_bad_rows:
            raise DataError(f"{where}. There are more bad rows than max_bad_rows={config.max_bad_rows}.")


def _join_safetensors(path: Path, folder: Path, shapes: dict[str, tuple[str, list[int]]], metadata: dict) -> None:
    """Writes a safetensors file from raw files, without holding a tensor in memory."""
    header, position = {"__metadata__": metadata}, 0
    for name, (dtype, shape) in shapes.items():
        size = (folder / name).stat().st_size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as joined:
        joined.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in shapes:
            with open(folder / name, "rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
