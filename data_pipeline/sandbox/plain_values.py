"""The only thing that crosses between a candidate and its judge: plain values, as framed JSON.

Values of built-in types travel by value; an instance of a subclass travels as the built-in value
that it holds, so that an overloaded `__eq__` stays behind. Any other object stays where it is and
is known to the other side by a number (`Reference`). A frame is a 4-byte length and JSON text.

This module runs inside the sandbox as well, on the standard library alone.
"""

import json
import socket
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_FRAME_BYTES = 16 * 2**20
_SAFE_INT = 2**63


class BadFrame(Exception):
    """The other side closed the connection, or sent what is no frame or no plain value."""


def send(connection: socket.socket, message: Any) -> None:
    """Send a JSON value.

    Raises:
        ValueError: it is longer than `MAX_FRAME_BYTES`.
        OSError: the other side is gone.
    """
    data = json.dumps(message).encode("ascii")
    if len(data) > MAX_FRAME_BYTES:
        raise ValueError(f"a value of {len(data)} bytes is too large to be returned")
    connection.sendall(len(data).to_bytes(4, "big") + data)


def receive(connection: socket.socket) -> Any:
    """Wait for a JSON value.

    Raises:
        BadFrame: the connection ended, or the frame is too long or not JSON.
        TimeoutError: the socket has a timeout and it passed.
    """
    length = int.from_bytes(_read(connection, 4), "big")
    if length > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {length} bytes")
    try:
        return json.loads(_read(connection, length))
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"not JSON: {error}") from None


def _read(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes."""
    parts = []
    while count:
        try:
            part = connection.recv(min(count, 1 << 20))
        except ConnectionError:
            part = b""
        if not part:
            raise BadFrame("the connection ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def encode(value: Any, refer: Callable[[Any], int]) -> Any:
    """The JSON form of a value.

    Args:
        value: anything.
        refer: called with an object that is not plain; returns its number.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -_SAFE_INT <= value < _SAFE_INT else {"int": hex(value)}
    if kind is list:
        return [encode(item, refer) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return encode(int.__int__(value), refer)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, list):
        return [encode(item, refer) for item in list.__iter__(value)]
    for base, tag in _COLLECTIONS:
        if isinstance(value, base):
            return {tag: [encode(item, refer) for item in base.__iter__(value)]}
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {"dict": [[encode(key, refer), encode(item, refer)] for key, item in pairs]}
    return _encode_rare(value, refer)


_TYPES = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)
}
_COLLECTIONS: tuple[tuple[Any, str], ...] = (
    (tuple, "tuple"),
    (set, "set"),
    (frozenset, "frozenset"),
)


def _encode_rare(value: Any, refer: Callable[[Any], int]) -> Any:
    """What is left: binary, numbers of other kinds, and objects."""
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, type) and value in _TYPES.values():
        return {"type": value.__name__}
    if type(value) is range:
        return {"range": [hex(part) for part in (value.start, value.stop, value.step)]}
    if type(value) is Decimal:
        return {"decimal": str(value)}
    if type(value) is Fraction:
        return {"fraction": [hex(value.numerator), hex(value.denominator)]}
    return {"reference": refer(value)}


def decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    """The value of a JSON form; every result is of exactly a built-in type, or from `resolve`.

    Args:
        data: from `receive`; it may come from a hostile process.
        resolve: what stands for the object with a number.

    Raises:
        BadFrame: it is the form of no value.
    """
    try:
        return _decode(data, resolve)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise BadFrame(f"not a plain value: {type(error).__name__}: {error}") from None


def _decode(data: Any, resolve: Callable[[int], Any]) -> Any:
    if isinstance(data, list):
        return [_decode(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    ((tag, content),) = data.items()
    if tag == "reference":
        return resolve(int(content))
    return _DECODERS[tag](content, lambda item: _decode(item, resolve))


_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "type": lambda name, _: _TYPES[name],
    "int": lambda text, _: int(text, 16),
    "tuple": lambda items, inner: tuple(map(inner, items)),
    "set": lambda items, inner: set(map(inner, items)),
    "frozenset": lambda items, inner: frozenset(map(inner, items)),
    "dict": lambda pairs, inner: {inner(key): inner(item) for key, item in pairs},
    "bytes": lambda text, _: bytes.fromhex(text),
    "bytearray": lambda text, _: bytearray.fromhex(text),
    "complex": lambda parts, _: complex(float(parts[0]), float(parts[1])),
    "range": lambda parts, _: range(*(int(part, 16) for part in parts)),
    "decimal": lambda text, _: Decimal(text),
    "fraction": lambda parts, _: Fraction(int(parts[0], 16), int(parts[1], 16)),
}
