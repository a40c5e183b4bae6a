"""The only thing that crosses between a candidate and its judge: plain values, as framed JSON.

Values of built-in types travel by value; an instance of a subclass travels as the built-in value
that it holds, so that an overloaded `__eq__` stays behind. numpy's arrays and numbers travel by
value where both sides have numpy. Any other object stays where it is and is known to the other side
by a number (`Reference`). What a call may change in its arguments has a number too (`Shared`). A
frame is a 4-byte length and JSON text.

This module runs inside the sandbox as well, on the standard library alone.
"""

import json
import operator
import re
import socket
import sys
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


class Shared:
    """The mutable containers in the arguments of a call, which both sides number alike.

    A call may change them; what it changed comes back with its result, into the caller's own. The
    result may be one of them, or hold it, and two arguments may be the same.

    Attributes:
        items: lists, dictionaries, sets, byte arrays and numpy arrays in the order in which the
            arguments mention them.
    """

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._numbers: dict[int, int] = {}

    def number(self, value: Any) -> int | None:
        """The number of a container; None if it is not among them."""
        return self._numbers.get(id(value))

    def add(self, value: Any) -> None:
        """Number a container."""
        self._numbers[id(value)] = len(self.items)
        self.items.append(value)

    def snapshot(self) -> list[Any]:
        """What each holds now, for `changes`."""
        return [_content(item) for item in self.items]

    def changes(self, before: list[Any], refer: Callable[[Any], int]) -> list[Any]:
        """Number and form of each container that no longer holds what it held."""
        now = [_content(item) for item in self.items]
        return [
            [number, encode(_copy(self.items[number]), refer, self)]
            for number, (old, new) in enumerate(zip(before, now, strict=True))
            if not _is_same(old, new)
        ]

    def apply(self, changes: Any, resolve: Callable[[int], Any]) -> None:
        """Make the caller's containers hold what the other side's hold.

        Args:
            changes: from `changes`; it may come from a hostile process.
            resolve: as for `decode`.

        Raises:
            BadFrame: it does not fit the containers.
        """
        try:
            for number, data in changes:
                item, new = self.items[number], decode(data, resolve, self)
                if type(new) is not _kind(item):
                    raise BadFrame("an argument that has become another kind of value")
                _refill(item, new)
        except (TypeError, ValueError, IndexError) as error:
            raise BadFrame(f"no changes of arguments: {error}") from None


def _kind(item: Any) -> type:
    """The built-in kind of a container, whatever its class is; numpy's array for the rest."""
    return next((kind for kind in _MUTABLE if isinstance(item, kind)), type(item))


def _copy(item: Any) -> Any:
    """A container of exactly its built-in kind with the same entries, which is not `item`."""
    kind = _kind(item)
    return kind(item) if kind in _MUTABLE else item.copy()


_MUTABLE: tuple[type, ...] = (list, dict, set, bytearray)


def _content(item: Any) -> Any:
    """What a container holds, to be told from what it will hold."""
    if isinstance(item, list):
        return list.copy(item)
    if isinstance(item, dict):
        return [part for pair in dict.items(item) for part in pair]
    if isinstance(item, set):
        return sorted(set.__iter__(item), key=id)
    return bytes(item) if isinstance(item, bytearray) else (item.shape, item.dtype, item.tobytes())


def _is_same(old: Any, new: Any) -> bool:
    """Whether two contents are the same; entries by identity, as their `__eq__` may be anything."""
    if not isinstance(old, list):
        return bool(old == new)
    return len(old) == len(new) and all(map(operator.is_, old, new))


def _refill(item: Any, new: Any) -> None:
    """Put the entries of a container into another one of its kind."""
    if isinstance(item, list | bytearray):
        item[:] = new
    elif isinstance(item, dict | set):
        item.clear()
        item.update(new)
    elif item.shape == new.shape and item.dtype == new.dtype:
        item[...] = new
    else:
        raise BadFrame("an array that has become another")


def encode(
    value: Any,
    refer: Callable[[Any], int],
    shared: Shared | None = None,
    *,
    is_argument: bool = False,
) -> Any:
    """The JSON form of a value.

    Args:
        value: anything.
        refer: called with an object that is not plain; returns its number.
        shared: containers that the other side holds as well: they go by number.
        is_argument: add the containers in the value to `shared`.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -_SAFE_INT <= value < _SAFE_INT else {"int": hex(value)}
    if "numpy" in sys.modules and (form := _encode_numpy(value, shared, is_argument)) is not None:
        return form
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return encode(int.__int__(value), refer)
    if isinstance(value, float):
        return float.__float__(value)
    if shared is not None and isinstance(value, _MUTABLE):
        number = shared.number(value)
        if number is not None:
            return {"same": number}
        if is_argument:
            shared.add(value)
    if isinstance(value, list):
        return [encode(i, refer, shared, is_argument=is_argument) for i in list.__iter__(value)]
    for base, tag in _COLLECTIONS:
        if isinstance(value, base):
            items = base.__iter__(value)
            return {tag: [encode(i, refer, shared, is_argument=is_argument) for i in items]}
    if isinstance(value, dict):
        return {
            "dict": [
                [encode(part, refer, shared, is_argument=is_argument) for part in pair]
                for pair in dict.items(value)
            ]
        }
    return _encode_rare(value, refer)


def _encode_numpy(value: Any, shared: Shared | None, is_argument: bool) -> Any:
    """The form of an array or a number of numpy that holds plain data; None for all else."""
    numpy: Any = sys.modules["numpy"]
    is_array = type(value) is numpy.ndarray
    if not (is_array or (type(value).__module__ == "numpy" and isinstance(value, numpy.generic))):
        return None
    if not _DTYPE.fullmatch(value.dtype.str):
        return None
    if is_array and shared is not None:
        number = shared.number(value)
        if number is not None:
            return {"same": number}
        if is_argument:
            shared.add(value)
    form = [value.dtype.str, list(value.shape), value.tobytes().hex()]
    return {"array" if is_array else "scalar": form}


def _decode_numpy(data: Any) -> Any:
    """An array; numpy is imported where it is to be had."""
    import numpy

    code, shape, content = data
    if not _DTYPE.fullmatch(code):
        raise BadFrame("an array of no plain data")
    flat = numpy.frombuffer(bytes.fromhex(content), dtype=numpy.dtype(code))
    return flat.reshape(shape).copy()


# bool, int, unsigned, float, complex, text and time; no objects
_DTYPE = re.compile(r"[<>|=][biufcSUmM]\d{1,9}(\[\d*[A-Za-z]{1,2}\])?")
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


def decode(
    data: Any,
    resolve: Callable[[int], Any],
    shared: Shared | None = None,
    *,
    is_argument: bool = False,
) -> Any:
    """The value of a JSON form; every result is of exactly a built-in type, or from `resolve`.

    Args:
        data: from `receive`; it may come from a hostile process.
        resolve: what stands for the object with a number.
        shared: containers that may be named by number.
        is_argument: add the containers of the form to `shared`, in the order in which `encode` did.

    Raises:
        BadFrame: it is the form of no value.
    """
    try:
        return _decode(data, resolve, shared, shared if is_argument else None)
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise BadFrame(f"not a plain value: {type(error).__name__}: {error}") from None
    except (ImportError, MemoryError) as error:
        raise BadFrame(f"a value that cannot be held: {error}") from None


def _decode(
    data: Any, resolve: Callable[[int], Any], known: Shared | None, new: Shared | None
) -> Any:
    if not isinstance(data, list | dict):
        return data

    def inner(item: Any) -> Any:
        return _decode(item, resolve, known, new)

    tag: str
    content: Any
    ((tag, content),) = [("list", data)] if isinstance(data, list) else data.items()
    if tag == "reference":
        return resolve(int(content))
    if tag == "same":
        if known is None or type(content) is not int or content < 0:
            raise BadFrame("a container that nobody shares")
        return known.items[content]
    if tag in _FILLED:
        # numbered before its entries are, which may hold it
        value = _FILLED[tag][0]()
        if new is not None:
            new.add(value)
        _FILLED[tag][1](value, content, inner)
        return value
    value = _DECODERS[tag](content, inner)
    if new is not None and tag in ("bytearray", "array"):
        new.add(value)
    return value


_FILLED: dict[str, tuple[type, Callable[[Any, Any, Callable[[Any], Any]], None]]] = {
    "list": (list, lambda value, items, inner: value.extend(map(inner, items))),
    "set": (set, lambda value, items, inner: value.update(map(inner, items))),
    "dict": (
        dict,
        lambda value, pairs, inner: value.update([[inner(k), inner(v)] for k, v in pairs]),
    ),
}
_DECODERS: dict[str, Callable[[Any, Callable[[Any], Any]], Any]] = {
    "type": lambda name, _: _TYPES[name],
    "int": lambda text, _: int(text, 16),
    "tuple": lambda items, inner: tuple(map(inner, items)),
    "frozenset": lambda items, inner: frozenset(map(inner, items)),
    "bytes": lambda text, _: bytes.fromhex(text),
    "bytearray": lambda text, _: bytearray.fromhex(text),
    "array": lambda parts, _: _decode_numpy(parts),
    "scalar": lambda parts, _: _decode_numpy(parts)[()],
    "complex": lambda parts, _: complex(float(parts[0]), float(parts[1])),
    "range": lambda parts, _: range(*(int(part, 16) for part in parts)),
    "decimal": lambda text, _: Decimal(text),
    "fraction": lambda parts, _: Fraction(int(parts[0], 16), int(parts[1], 16)),
}
