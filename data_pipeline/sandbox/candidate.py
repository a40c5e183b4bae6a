"""Runs a generated program inside the sandbox and answers calls to its functions.

The process holds the program and the arguments of the call at hand: no test, no expected value. It
answers with plain values, so whatever the program patches, overloads or forges here, the judge in
another process sees only data.
"""

import builtins
import random
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from data_pipeline.sandbox.plain_values import BadFrame, Shared, decode, encode, receive, send

MODULE = "candidate"
_MISSING = object()


def run(job: dict[str, Any], descriptors: list[int]) -> None:
    """Execute the program, then serve the judge until it hangs up.

    Args:
        job: `program`, the source text.
        descriptors: the connection to the judge.
    """
    connection = socket.socket(fileno=descriptors[0])
    random.seed(0)
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module  # dataclasses and pickle look a class's module up
    try:
        exec(compile(job["program"], f"<{MODULE}>", "exec"), module.__dict__)
    except BaseException as error:
        send(connection, {"error": describe(error)})
        return
    send(connection, {"ready": True})
    server = _Server(module)
    while True:
        try:
            request = receive(connection)
        except BadFrame:
            return
        send(connection, {"token": request["token"], **server.answer(request)})


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as plain values: the built-in kind nearest to it, and its text."""
    names = [kind.__name__ for kind in type(error).__mro__]
    known = next(name for name in names if hasattr(builtins, name))
    try:
        text = str(error)[:500]
    except BaseException:  # the text is made by code of the program
        text = ""
    return {"kind": known, "name": names[0], "text": text.encode("ascii", "replace").decode()}


class _Server:
    """Objects of the program by number, and what may be done with them."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.objects: list[Any] = []

    def refer(self, value: Any) -> int:
        """The number of an object; the same object keeps its number."""
        for number, known in enumerate(self.objects):
            if known is value:
                return number
        self.objects.append(value)
        return len(self.objects) - 1

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out a request; the result or the exception, as plain values.

        What the arguments hold afterwards goes along, where it is not what they held before.
        """
        shared = Shared()

        def argument(item: Any) -> Any:
            return decode(item, self.objects.__getitem__, shared, is_argument=True)

        before: list[Any] = []
        try:
            arguments = [argument(item) for item in request["arguments"]]
            keywords = {key: argument(item) for key, item in request["keywords"].items()}
            before = shared.snapshot()
            if request["operation"] == "globals":
                found = {name: getattr(self.module, name, _MISSING) for name in arguments}
                present = {name: item for name, item in found.items() if item is not _MISSING}
                return {"value": encode(present, self.refer)}
            result = _OPERATIONS[request["operation"]](*arguments, **keywords)
            answer = {"value": encode(result, self.refer, shared)}
        except BaseException as error:
            answer = {"error": describe(error)}
        try:
            return {**answer, "changes": shared.changes(before, self.refer)}
        except BaseException as error:
            return {"error": describe(error)}


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *arguments, **keywords: target(*arguments, **keywords),
    "getattr": getattr,
    "setattr": setattr,
    "iter": list,
    "len": len,
    "bool": bool,
    "item": lambda target, key: target[key],
}
