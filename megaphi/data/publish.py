"""Files that appear complete or not at all: written under a temporary name, then renamed.

Used for everything that lies beside a token file. Bytes are hashed on their way out, so that the
SHA-256 recorded for a file is that of what was meant, not of what a disk gave back.
"""

import hashlib
import os
import secrets
from pathlib import Path

from megaphi.errors import RunError

_WRITE_BYTES = 1 << 20  # gather this much before hashing and writing


class NewFile:
    """A file being written as `<final>.tmp-<pid>-<random>`.

    `close` makes the bytes durable, `publish` renames, `discard` removes the temporary file.

    Args:
        final: name after `publish`; missing folders are made.
        error_type: raised when a write fails, with the file's name and the system's reason.
    """

    def __init__(self, final: Path, error_type: type[RunError] = RunError) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        self.final = final
        self.temporary = Path(f"{final}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        self._file = self.temporary.open("xb", buffering=0)
        self._error_type = error_type
        self._pending = bytearray()
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex digest of everything written; complete after `close`."""
        return self._hash.hexdigest()

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._pending += data
        if len(self._pending) >= _WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        block, self._pending = bytes(self._pending), bytearray()
        self._hash.update(block)
        try:
            while block:
                block = block[self._file.write(block) :]
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> RunError:
        return self._error_type(
            f"{self.temporary}: cannot write: {error.strerror}; {self.final.name} was not made"
        )

    def close(self) -> None:
        """Write out, fsync and close."""
        self._flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failed(error) from error
        self._file.close()

    def publish(self) -> None:
        """Rename to the final name; the caller then fsyncs the folder."""
        self.temporary.replace(self.final)

    def discard(self) -> None:
        """Close and remove the temporary file, if it is still there."""
        self._file.close()
        self.temporary.unlink(missing_ok=True)
