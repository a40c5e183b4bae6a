"""Safetensors and JSON files, read with suspicion.

A model file may come from anybody. Everything here reads headers before data, opens files by plain
names inside one directory, and never unpickles. The safetensors library itself refuses headers
whose tensors overlap, leave gaps or run past the end of the file.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaphi.formats.manifest import CheckpointError

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# phi-1's own header has 40 kB, its tokenizer.json 2 MB; parsed, either grows about twentyfold
_MAX_HEADER_BYTES = 1 << 24
_MAX_JSON_BYTES = 1 << 22
TOKENIZER_BYTES = 1 << 25


@dataclass(frozen=True)
class StoredTensor:
    """Header entry of one tensor (or one shard of it) in a safetensors file."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name of the format: F32, BF16, F16, I64, …"""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The floating-point format.

        Raises:
            CheckpointError: the file holds another kind of number.
        """
        if self.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.path}: {self.name} is {self.dtype}, a weight must be one of "
                f"{', '.join(FLOAT_DTYPES)}"
            )
        return FLOAT_DTYPES[self.dtype]

    def read(self) -> Tensor:
        """The data, on the CPU."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path}: cannot read {self.name}: {error}") from error
        return tensor


def read_header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """List the tensors of a safetensors file, and its metadata; no data is read.

    Raises:
        CheckpointError: the file is missing or not a sound safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with path.open("rb") as start:
            header_bytes = int.from_bytes(start.read(8), "little")
        if header_bytes > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise CheckpointError(
                f"{path}: not a readable safetensors file (a header of {header_bytes} bytes)"
            )
        with safe_open(path, framework="pt") as file:
            entries = []
            for name in file.keys():  # noqa: SIM118 (not a mapping: it has no __iter__)
                piece = file.get_slice(name)
                entries.append(
                    StoredTensor(path, name, tuple(piece.get_shape()), piece.get_dtype())
                )
            return entries, dict(file.metadata() or {})
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def read_json_object(path: Path, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a file that holds one JSON object, of at most `max_bytes`.

    Raises:
        ValueError: the file is missing, too large, not JSON, nested too deeply or not an object.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > max_bytes:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, too large to be what it should be")
    try:
        values = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1GiB` or a plain number.

    Raises:
        ValueError: the text is none of these or not positive.
    """
    units = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    lowered = text.strip().lower()
    unit = next(
        (unit for unit in sorted(units, key=len, reverse=True) if lowered.endswith(unit)), ""
    )
    number = lowered.removesuffix(unit).strip()
    try:
        size = float(number) * units.get(unit, 1)
    except ValueError:
        size = math.nan
    if not 1 <= size < 2**63:
        raise ValueError(f"size {text!r} is not understood; write for instance 5GB, 200MB or 1GiB")
    return int(size)


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape, format and bits (NaN equals the same NaN)."""
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(
            first.contiguous().view(-1).view(torch.uint8),
            second.contiguous().view(-1).view(torch.uint8),
        )
    )


def require_finite(tensor: Tensor, where: str) -> Tensor:
    """The tensor, if all of its values are finite; one pass that allocates nothing.

    Raises:
        CheckpointError: a value is NaN or infinite; with such a weight every answer is noise.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return tensor
    if not all(bool(end.isfinite()) for end in tensor.aminmax()):
        raise CheckpointError(
            f"{where}: values that are not finite (NaN or infinity); such a model answers "
            "nothing: take an earlier checkpoint, or get the file again"
        )
    return tensor


def overflows(original: Tensor, converted: Tensor) -> bool:
    """Whether a cast made a finite value infinite."""
    if torch.finfo(converted.dtype).max >= torch.finfo(original.dtype).max or not original.numel():
        return False
    # one pass that allocates nothing; a NaN among the values is the result of both
    if all(bool(end.isfinite()) for end in converted.aminmax()):
        return False
    return bool((converted.isinf() & original.isfinite()).any())
