"""Token ids -> shard files that can be cut back to what a journal vouches for."""

import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.rows.shards import SHARD_DTYPES

_NUMBER = "[0-9]" * 5  # of a shard; in a mixture that of the source, of two digits, is before it
# Patterns of the files' names.
SHARDS = tuple(
    f"{split}-{source}{_NUMBER}.bin"
    for split in ("train", "eval")
    for source in ("", "[0-9][0-9]-", "[0-9][0-9][0-9]-")
)


class ShardWriter:
    """Appends ids to `{prefix}-NNNNN.bin` files of shard_tokens each; `tokens` and `crc` (CRC-32)
    are of all it has taken."""

    def __init__(self, folder: Path, prefix: str, dtype: str, shard_tokens: int) -> None:
        """Begin with nothing taken; `dtype` is a key of SHARD_DTYPES."""
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.dtype = np.dtype(SHARD_DTYPES[dtype])
        self.tokens, self.crc = 0, 0
        self.file: BinaryIO | None = None

    def path(self, number: int) -> Path:
        """The file of this number."""
        return self.folder / f"{self.prefix}-{number:05d}.bin"

    def write(self, ids: np.ndarray) -> None:
        """Append ids, beginning a new file wherever one is full."""
        while len(ids):
            number, used = divmod(self.tokens, self.shard_tokens)
            if used == 0 or self.file is None:
                self.sync()
                self.file = self.path(number).open("ab" if used else "wb")
            part = ids[: self.shard_tokens - used].astype(self.dtype).tobytes()
            self.file.write(part)
            self.crc = zlib.crc32(part, self.crc)
            self.tokens += len(part) // self.dtype.itemsize
            ids = ids[self.shard_tokens - used :]

    def sync(self) -> None:
        """Bring all that was written to the disk."""
        if self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None

    def restore(self, tokens: int, crc: int) -> bool:
        """Cut the files back to their first `tokens` tokens; False if these are not those that
        `crc` was taken of."""
        self.tokens, self.crc = tokens, 0
        kept = -(-tokens // self.shard_tokens)  # files
        for number, start in enumerate(range(0, tokens, self.shard_tokens)):
            left = min(self.shard_tokens, tokens - start) * self.dtype.itemsize
            if not self.path(number).exists() or self.path(number).stat().st_size < left:
                return False
            os.truncate(self.path(number), left)
            with self.path(number).open("rb") as file:
                while block := file.read(1 << 20):
                    self.crc = zlib.crc32(block, self.crc)
        for number in range(kept, len(list(self.folder.glob(f"{self.prefix}-*.bin")))):
            self.path(number).unlink(missing_ok=True)
        return self.crc == crc
