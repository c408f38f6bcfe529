"""A CRC-32 inside a safetensors file, so that damage to a file is detected when it is read again.

The writer puts `PLACEHOLDER` into the metadata, and `seal` replaces it when the file is complete. The CRC covers all
other bytes, including the header. It runs at about 2 GB/s.
"""

import re
import zlib
from pathlib import Path

PLACEHOLDER = {"checksum": "0" * 8}  # for the metadata
_BLOCK = 1 << 20
_LARGEST_HEADER = 100_000_000  # the limit of the format


def seal(path: Path) -> None:
    """Write the checksum of a complete file into it."""
    offset = _find_offset(path)
    assert offset is not None, "the metadata has no PLACEHOLDER"
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(_crc(path, offset))


def is_sealed(path: Path) -> bool:
    """Return whether a file has a checksum; files of minitrain 0.1.0 do not. Raises OSError."""
    return _find_offset(path) is not None


def is_intact(path: Path) -> bool:
    """Return whether a file has a checksum that matches its content. Raises OSError."""
    offset = _find_offset(path)
    if offset is None:
        return False
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(8) == _crc(path, offset)


def _find_offset(path: Path) -> int | None:
    """Return the offset of the checksum's first digit in the file; None without a checksum."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, _LARGEST_HEADER))
    match = re.search(rb'"checksum":\s*"([0-9a-f]{8})"', header)
    return None if match is None else 8 + match.start(1)


def _crc(path: Path, offset: int) -> bytes:
    """Return the CRC-32 in hexadecimal of all bytes except the checksum at `offset`."""
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(offset))
        file.seek(8, 1)
        while block := file.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return b"%08x" % crc
