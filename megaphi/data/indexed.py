"""Megatron token files: `<prefix>.bin` holds the token ids, `<prefix>.idx` says where each is.

The bytes are those that Megatron-Core's IndexedDatasetBuilder writes (0.16 to 0.19), so files move
both ways. All integers are little-endian and nothing is padded:

    .bin   the ids of every sequence, one after another, in one integer dtype
    .idx   magic, u64 version, u8 dtype code, u64 N sequences, u64 D = documents + 1,
           i32[N] sequence lengths in tokens, i64[N] byte offsets into .bin,
           i64[D] running number of sequences after each document, starting with 0,
           i8[N] sequence modes, in multimodal files only (the header does not say so)

Where Megatron trusts the files, this reader checks them when they are opened; where Megatron
writes under the final name, this writer publishes complete files only. numpy only: no torch.
"""

import hashlib
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megaphi.durable import NewFile, sync
from megaphi.errors import RunError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: "dict[int, np.dtype[Any]]" = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_UINT16_VOCABULARY_LIMIT = 65_500  # Megatron's rule, not 65,536: keep it, files must not differ
_MAX_SEQUENCE_LENGTH = 2**31 - 1  # lengths are stored as int32
_COPY_BYTES = 16 << 20  # add_index copies in pieces of this size


class TokenFileError(RunError):
    """A token file is broken, incomplete or cannot be written; the message names the file."""


class TokenFilePaths(NamedTuple):
    """The files of one prefix: tokens, index, and the optional description alongside them."""

    bin: Path
    idx: Path
    info: Path


def token_file_paths(prefix: str | Path) -> TokenFilePaths:
    """The three paths of a prefix; a dot in the prefix itself is kept."""
    return TokenFilePaths(*(Path(f"{prefix}{suffix}") for suffix in (".bin", ".idx", ".json")))


def optimal_dtype(vocab_size: int) -> "np.dtype[Any]":
    """The dtype that Megatron's tools write: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2" if vocab_size < _UINT16_VOCABULARY_LIMIT else "<i4")


@dataclass(frozen=True)
class TokenFileIndex:
    """The checked contents of an .idx file, as aligned arrays (see `IndexedDataset`)."""

    dtype: "np.dtype[Any]"
    lengths: NDArray[np.int32]
    pointers: NDArray[np.int64]
    document_index: NDArray[np.int64]
    modes: NDArray[np.int8] | None
    num_tokens: int


def read_index(prefix: str | Path, multimodal: bool = False) -> TokenFileIndex:
    """Read `<prefix>.idx` and check it against itself and the size of `<prefix>.bin`.

    Raises:
        FileNotFoundError: neither file exists.
        TokenFileError: one is missing or broken, or they do not fit each other.
    """
    bin_path, idx_path, _ = token_file_paths(prefix)
    if not idx_path.exists():
        if bin_path.exists():
            raise TokenFileError(
                f"{idx_path}: missing although {bin_path.name} exists: was the build interrupted? "
                "build the token file again"
            )
        raise FileNotFoundError(
            f"{idx_path}: no such token file (give the prefix, without .bin or .idx)"
        )
    if not bin_path.exists():
        raise TokenFileError(f"{bin_path}: missing although {idx_path.name} exists; copy both")
    with idx_path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(_HEADER.size)
        dtype, num_sequences, num_entries = _parse_header(idx_path, header)
        expected = _HEADER.size + 12 * num_sequences + 8 * num_entries
        expected += num_sequences if multimodal else 0
        if size != expected:
            hint = "; is it a multimodal file?" if size - expected == num_sequences > 0 else ""
            raise TokenFileError(
                f"{idx_path}: {size} bytes, but {num_sequences} sequences and "
                f"{num_entries - 1} documents need {expected}{hint}"
            )
        lengths = np.fromfile(file, "<i4", num_sequences)
        pointers = np.fromfile(file, "<i8", num_sequences)
        document_index = np.fromfile(file, "<i8", num_entries)
        modes = np.fromfile(file, "i1", num_sequences) if multimodal else None
    num_tokens = _check_sequences(idx_path, lengths, pointers, dtype.itemsize)
    _check_documents(idx_path, document_index, num_sequences)
    if bin_path.stat().st_size != num_tokens * dtype.itemsize:
        raise TokenFileError(
            f"{bin_path}: {bin_path.stat().st_size} bytes, but {idx_path.name} describes "
            f"{num_tokens} {dtype.name} tokens = {num_tokens * dtype.itemsize} bytes; "
            "the file is truncated, was added to, or belongs to another index"
        )
    return TokenFileIndex(dtype, lengths, pointers, document_index, modes, num_tokens)


def _parse_header(idx_path: Path, header: bytes) -> tuple["np.dtype[Any]", int, int]:
    """Token dtype, number of sequences and of document-index entries."""
    if len(header) < _HEADER.size:
        raise TokenFileError(f"{idx_path}: {len(header)} bytes, shorter than the 34-byte header")
    magic, version, code, num_sequences, num_entries = _HEADER.unpack(header)
    if magic != MAGIC:
        raise TokenFileError(f"{idx_path}: not a Megatron index (it does not start with MMIDIDX)")
    if version != VERSION:
        raise TokenFileError(f"{idx_path}: index version {version}, only version 1 is known")
    if code not in _DTYPES:
        kind = "a float dtype, which forks number differently" if code in (6, 7) else "unknown"
        raise TokenFileError(f"{idx_path}: token dtype code {code} is {kind}")
    if num_entries < 1:
        raise TokenFileError(f"{idx_path}: the document index is empty, it must start with 0")
    return _DTYPES[code], int(num_sequences), int(num_entries)


def _check_sequences(
    idx_path: Path, lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int
) -> int:
    """Check lengths and pointers as upstream writes them; returns the number of tokens."""
    negative = np.flatnonzero(lengths < 0)
    if negative.size:
        at = int(negative[0])
        raise TokenFileError(f"{idx_path}: sequence {at} has length {lengths[at]}")
    ends = np.cumsum(lengths, dtype=np.int64)
    misplaced = np.flatnonzero(pointers != (ends - lengths) * itemsize)
    if misplaced.size:
        at = int(misplaced[0])
        expected = int(ends[at] - lengths[at]) * itemsize
        raise TokenFileError(
            f"{idx_path}: sequence {at} points to byte {pointers[at]}, expected {expected} "
            "(sequences must lie in .bin in order and without gaps)"
        )
    return int(ends[-1]) if ends.size else 0


def _check_documents(idx_path: Path, document_index: NDArray[np.int64], num_sequences: int) -> None:
    """Check that the document index runs from 0 to N and never back."""
    if document_index[0] != 0:
        raise TokenFileError(f"{idx_path}: document index starts with {document_index[0]}, not 0")
    backwards = np.flatnonzero(document_index[1:] < document_index[:-1])
    if backwards.size:
        raise TokenFileError(f"{idx_path}: document index runs back at entry {backwards[0] + 1}")
    if document_index[-1] != num_sequences:
        raise TokenFileError(
            f"{idx_path}: document index ends with {document_index[-1]}, "
            f"but there are {num_sequences} sequences"
        )


class IndexedDataset:
    """A memory-mapped token file, checked completely (but for the token values) when opened.

    Attributes:
        prefix: the path without `.bin`.
        dtype: token dtype of `.bin`.
        lengths: int32 [N], tokens in each sequence.
        pointers: int64 [N], byte offset of each sequence in `.bin`.
        document_index: int64 [D], running number of sequences after each document, first 0.
        modes: int8 [N] in a multimodal file, else None.
        num_tokens: sum of the lengths.

    Args:
        prefix: path without `.bin` or `.idx`.
        multimodal: the file carries sequence modes (its header cannot say so).

    Raises:
        FileNotFoundError: neither file exists.
        TokenFileError: one is missing, they do not fit each other, or there are no tokens.
    """

    def __init__(self, prefix: str | Path, *, multimodal: bool = False) -> None:
        index = read_index(prefix, multimodal)
        bin_path = token_file_paths(prefix).bin
        if index.num_tokens == 0:
            raise TokenFileError(f"{bin_path}: the token file holds no tokens")
        self.prefix = Path(prefix)
        self.dtype = index.dtype
        self.lengths = index.lengths
        self.pointers = index.pointers
        self.document_index = index.document_index
        self.modes = index.modes
        self.num_tokens = index.num_tokens
        with bin_path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # A plain array over the map: slices of np.memmap itself are several times slower.
        self._tokens: NDArray[Any] = np.frombuffer(mapped, self.dtype, self.num_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes open the file themselves instead of receiving its contents.
        return partial(type(self), multimodal=self.modes is not None), (self.prefix,)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def __getitem__(self, i: int) -> NDArray[Any]:
        """Read-only view of sequence `i`."""
        return self.get(i)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> NDArray[Any]:
        """Read-only view of `length` tokens of sequence `i` from `offset` (None: to its end).

        Raises:
            IndexError: there is no such sequence, or it is shorter than that.
        """
        available = int(self.lengths[i])
        end = available if length is None else offset + length
        if not 0 <= offset <= end <= available:
            raise IndexError(
                f"{self.prefix}: no tokens {offset}:{end} in sequence {i}: {available}"
            )
        start = int(self.pointers[i]) // self.dtype.itemsize
        return self._tokens[start + offset : start + end]


class IndexedDatasetWriter:
    """Writes a token file; use as a context manager.

    Both files get temporary names next to the final ones. A clean exit publishes them, `.idx` last;
    an exception removes them and leaves files of an earlier build untouched. A killed process
    leaves temporary files only. Counts and index live in compact arrays: 12 bytes a sequence.

    Attributes:
        dtype: token dtype of `.bin`.
        num_tokens: tokens added so far.
        bin_sha256: hex digest of `.bin`, after `finalize`.
        idx_sha256: hex digest of `.idx`, after `finalize`.

    Args:
        prefix: path without `.bin`; missing folders are made.
        dtype: uint8, int8, int16, uint16, int32 or int64 (see `optimal_dtype`).

    Raises:
        ValueError: the dtype cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: "np.dtype[Any] | type[Any] | str") -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in _CODES:
            raise ValueError(f"{prefix}: tokens cannot be stored as {self.dtype}; use uint16/int32")
        self.prefix = Path(prefix)
        self.num_tokens = 0
        self.bin_sha256 = ""
        self.idx_sha256 = ""
        self._limits = np.iinfo(self.dtype)
        self._lengths = array("i")
        self._document_index = array("q", [0])
        paths = token_file_paths(prefix)
        self._bin = NewFile(paths.bin, TokenFileError)
        self._idx = NewFile(paths.idx, TokenFileError)
        self._finalized = False

    @property
    def num_documents(self) -> int:
        """Documents added so far, empty ones included."""
        return len(self._document_index) - 1

    @property
    def num_sequences(self) -> int:
        """Sequences added so far."""
        return len(self._lengths)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and not self._finalized:
                self.finalize()
        finally:
            if not self._finalized:
                self._bin.discard()
                self._idx.discard()

    def add_document(self, tokens: ArrayLike, lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: integer token ids, 1-D.
            lengths: tokens in each sequence of the document; None means one sequence, and an
                empty list an empty document (a repeated document-index entry).

        Raises:
            ValueError: an id does not fit the dtype, ids are not integers, or the lengths do not
                add up to the tokens. Nothing was added then.
        """
        ids = self._checked(tokens)
        sizes = [ids.size] if lengths is None else [int(length) for length in lengths]
        if sum(sizes) != ids.size or any(not 0 <= n <= _MAX_SEQUENCE_LENGTH for n in sizes):
            raise ValueError(
                f"{self.prefix}: document {self.num_documents} has {ids.size} tokens, "
                f"sequence lengths {sizes} do not fit"
            )
        self._bin.write(ids.tobytes())
        self._lengths.extend(sizes)
        self._document_index.append(len(self._lengths))
        self.num_tokens += ids.size

    def _checked(self, tokens: ArrayLike) -> NDArray[Any]:
        """Tokens as a contiguous array of the file's dtype; numpy's own cast would wrap ids."""
        ids = np.asarray(tokens)
        if ids.size == 0:
            return np.empty(0, self.dtype)
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise ValueError(
                f"{self.prefix}: document {self.num_documents}: tokens must be a 1-D array of "
                f"integers, not {ids.dtype} with shape {ids.shape}"
            )
        if ids.dtype != self.dtype:
            for extreme in (int(ids.min()), int(ids.max())):
                if not self._limits.min <= extreme <= self._limits.max:
                    raise ValueError(
                        f"{self.prefix}: document {self.num_documents}: token id {extreme} does "
                        f"not fit {self.dtype.name}"
                    )
        return np.ascontiguousarray(ids, dtype=self.dtype)

    def add_index(self, prefix: str | Path) -> str:
        """Append another token file of the same dtype, in bounded memory.

        Args:
            prefix: the other token file; it may be empty.

        Returns:
            Hex digest of the token bytes that were copied.

        Raises:
            ValueError: the dtypes differ.
            TokenFileError: the other file is broken.
        """
        other = read_index(prefix)
        if other.dtype != self.dtype:
            raise ValueError(
                f"{prefix}: holds {other.dtype.name} tokens, cannot join {self.dtype.name} tokens "
                f"of {self.prefix}"
            )
        copied = self._copy_tokens(token_file_paths(prefix).bin, other.num_tokens)
        self._document_index.frombytes((other.document_index[1:] + self.num_sequences).tobytes())
        self._lengths.frombytes(other.lengths.tobytes())
        self.num_tokens += other.num_tokens
        return copied

    def _copy_tokens(self, bin_path: Path, count: int) -> str:
        """Append `count` tokens from the start of another .bin; returns their SHA-256."""
        digest = hashlib.sha256()
        remaining = count * self.dtype.itemsize
        with bin_path.open("rb") as file:
            while remaining:
                block = file.read(min(remaining, _COPY_BYTES))
                if not block:
                    raise TokenFileError(f"{bin_path}: became shorter while it was being copied")
                digest.update(block)
                self._bin.write(block)
                remaining -= len(block)
        return digest.hexdigest()

    def finalize(self) -> None:
        """Publish both files: hash, fsync, rename, `.idx` last, fsync the folder."""
        assert not self._finalized
        lengths = np.frombuffer(self._lengths, np.int32)
        document_index = np.frombuffer(self._document_index, np.int64)
        code = _CODES[self.dtype]
        self._idx.write(_HEADER.pack(MAGIC, VERSION, code, len(lengths), len(document_index)))
        self._idx.write(lengths.astype("<i4", copy=False).tobytes())
        pointers = np.cumsum(lengths, dtype=np.int64)
        pointers -= lengths
        pointers *= self.dtype.itemsize
        self._idx.write(pointers.astype("<i8", copy=False).tobytes())
        self._idx.write(document_index.astype("<i8", copy=False).tobytes())
        self._bin.close()
        self._idx.close()
        # Killed between the renames, an older index must not describe the new tokens.
        paths = token_file_paths(self.prefix)
        paths.idx.unlink(missing_ok=True)
        paths.info.unlink(missing_ok=True)
        self._bin.publish()
        self._idx.publish()
        sync(paths.bin.parent)
        self._finalized = True
        self.bin_sha256 = self._bin.sha256
        self.idx_sha256 = self._idx.sha256
