"""Write a token cache: append each tensor to a raw file, then join the raw files into one safetensors file."""

import contextlib
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from minitrain.batch import TARGET_WEIGHTS
from minitrain.errors import DataError, write_error_code
from minitrain.io.checksum import PLACEHOLDER, seal
from minitrain.io.temp_files import new_file
from minitrain.io.tensor_files import ITEM_SIZES, start_file

from .text_encoder import Tokens

_DTYPES = {"F64": np.float64, "I64": np.int64, "F32": np.float32, "I32": np.int32, "U8": np.uint8}


@contextlib.contextmanager
def new_cache(path: Path, source: str) -> Iterator["CacheWriter"]:
    """Yield a writer for a cache. The file appears only after everything is written, and never after an error.

    Args:
        source: The data file's name, as messages show it.

    Raises:
        DataError: The cache directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as file, CacheWriter(file, source) as writer:
            yield writer
            writer.finish()
    except OSError as error:
        raise DataError(
            f"{path.parent}: the token cache cannot be written: {error.strerror}. Set cache_dir.",
            write_error_code(error),
        ) from None


class CacheWriter:
    """Appends documents to one raw file per tensor, and joins the raw files at the end.

    The caller sets `counts`, which go into the metadata.
    """

    def __init__(self, file: Path, source: str):
        self.file, self.folder, self.source = file, file.parent, source
        self.labels: dict[str, int] = {}
        self.counts: dict[str, int] = {}
        # One number per document: small enough to keep in memory until the end.
        self.offsets, self.lines, self.shared = array("q", [0]), array("q"), array("i")
        self.first_documents = array("q", [0])
        self.doc_features: dict[str, array] = {}
        self.files: dict[str, tuple[str, object]] = {}  # tensor -> (dtype, its open file)
        self.token_features: set[str] | None = None

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *error) -> None:
        self._close()

    def add(self, line: int, documents: list[Tokens]) -> None:
        self.lines.append(line)
        for document in documents:
            self._add(document)
        self.first_documents.append(len(self.shared))

    def _add(self, document: Tokens) -> None:
        self._align_weights(document)
        if self.token_features is None:
            self.token_features = set(document.token_features)
        if differing := sorted(self.token_features ^ set(document.token_features)):
            columns = ", ".join(differing)
            raise DataError(
                f"{self.source}: only some rows have {columns}. Provide the same columns in all rows.", "mismatch"
            )
        self.offsets.append(self.offsets[-1] + len(document.ids))
        self.shared.append(document.shared)
        for name, value in document.doc_features.items():
            number = self.labels.setdefault(value, len(self.labels)) if isinstance(value, str) else value
            self.doc_features.setdefault(name, array("d")).append(number)
        self._append("ids", "I32", document.ids)
        self._append("mask", "U8", document.mask)
        for name, feature in document.token_features.items():
            self._append(f"token_features/{name}", "F32", feature)

    def _align_weights(self, document: Tokens) -> None:
        """Give weights of 1 to documents that have none, as soon as one has."""
        if TARGET_WEIGHTS in document.token_features and self.token_features is not None:
            if TARGET_WEIGHTS not in self.token_features:
                ones = np.ones(self.offsets[-1], np.float32)
                self._append(f"token_features/{TARGET_WEIGHTS}", "F32", ones)
                self.token_features.add(TARGET_WEIGHTS)
        elif self.token_features and TARGET_WEIGHTS in self.token_features:
            document.token_features[TARGET_WEIGHTS] = np.ones(len(document.ids), np.float32)

    def finish(self) -> None:
        """Write the safetensors file from the raw files, without holding a tensor in memory."""
        for name, dtype in (("ids", "I32"), ("mask", "U8")):
            self._append(name, dtype, [])  # creates the file if there are no documents
        for name in ("offsets", "lines", "first_documents"):
            self._append(name, "I64", getattr(self, name))
        self._append("shared", "I32", self.shared)
        for name, numbers in self.doc_features.items():
            self._append(f"doc_features/{name}", "F64", numbers)
        self._close()
        # Widest dtype first, which keeps every tensor aligned.
        order = sorted(self.files, key=lambda name: -ITEM_SIZES[self.files[name][0]])
        metadata = PLACEHOLDER | {"counts": json.dumps(self.counts), "labels": json.dumps(list(self.labels))}
        tensors = {}
        for name in order:
            dtype, file = self.files[name]
            tensors[name] = dtype, [Path(file.name).stat().st_size // ITEM_SIZES[dtype]]
        with open(self.file, "wb") as joined:
            start_file(joined, tensors, metadata)
            for name in order:
                with open(self.files[name][1].name, "rb") as file:
                    shutil.copyfileobj(file, joined, 1 << 20)
        seal(self.file)

    def _close(self) -> None:
        for _, file in self.files.values():
            file.close()

    def _append(self, name: str, dtype: str, numbers: Iterable[float]) -> None:
        if name not in self.files:
            self.files[name] = dtype, open(self.folder / name.replace("/", "-"), "wb")
        self.files[name][1].write(np.asarray(numbers, _DTYPES[dtype]).tobytes())
