"""Runs a suite's test against a candidate in another process, and gives the verdict.

The test's code and its expected values live here; the candidate's code does not. A function of the
candidate is a stub that sends arguments and receives plain values, and every comparison is made by
this process on values of exact built-in types. A pass means that the whole test ran to its end.

An object that is not plain appears as a `Reference`. It can be called, indexed, iterated, and have
attributes, each answered with plain values by the candidate; it is equal to itself only.
"""

import builtins
import contextlib
import importlib
import random
import secrets
import socket
from typing import Any

from data_pipeline.sandbox.plain_values import BadFrame, Shared, decode, encode, receive, send

# Not among them are those that end loops or processes: a candidate must not cut a test short.
_RELAYED = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type)
    and issubclass(kind, Exception)
    and not issubclass(kind, StopIteration | StopAsyncIteration | UnicodeError | Warning)
}


class CandidateGone(BaseException):
    """The candidate's process does not answer; no `except Exception` of a test stops this."""


class CandidateLeft(BaseException):
    """The candidate raised what is no ordinary exception; the test ends here as well."""


class Unrunnable(BaseException):
    """The test's own code cannot run here, whatever the candidate is."""


def run(job: dict[str, Any], descriptors: list[int]) -> None:
    """Run the test and send the verdict: `{"status": …, "error": …}`.

    Args:
        job: `preamble` (trusted code before the test: the prompt or the imports), `test` (code),
            `entry_point` (the function under test, or null), `names` (of the candidate's globals
            that the test may use) and `modules` (of Python's that it uses without importing them).
            Or only `imports`: the verdict's `error` names the modules that are missing.
        descriptors: the connections to the candidate and to the parent.
    """
    if "imports" in job:
        status, error = "passed", " ".join(filter(_is_missing, job["imports"]))
    else:
        status, error = _verdict(_Candidate(socket.socket(fileno=descriptors[0])), job)
    # after the time limit nobody listens
    with socket.socket(fileno=descriptors[-1]) as parent, contextlib.suppress(OSError):
        send(parent, {"status": status, "error": error[:500]})


def _is_missing(module: str) -> bool:
    """Whether a module cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception:  # whatever a package raises when it cannot be
        return True
    return False


def _verdict(candidate: "_Candidate", job: dict[str, Any]) -> tuple[str, str]:
    """The status of a test that was run, and its message."""
    random.seed(0)
    try:
        _judge(candidate, job)
    except CandidateGone as gone:
        return "died", str(gone)
    except CandidateLeft as left:
        return "exception", str(left)
    except Unrunnable as problem:
        return "unrunnable", str(problem)
    except AssertionError as problem:
        return "failed", str(problem)
    except BaseException as problem:
        text = f"{type(problem).__name__}: {problem}"
        if candidate.raised:
            return "exception", text
        # what the test could not work with was given by the candidate, but for a missing module
        return "unrunnable" if isinstance(problem, ModuleNotFoundError) else "unlike", text
    return "passed", ""


def _judge(candidate: "_Candidate", job: dict[str, Any]) -> None:
    """Run the test; exceptions of the test and of the candidate pass through."""
    namespace: dict[str, Any] = {"__name__": "judge"}
    try:
        exec(compile(job["preamble"], "<preamble>", "exec"), namespace)
        for name in job["modules"]:
            namespace.setdefault(name, importlib.import_module(name))
        test = compile(job["test"], "<test>", "exec")
    except BaseException as problem:
        raise Unrunnable(f"{type(problem).__name__}: {problem}") from None
    ready = candidate.receive()
    if "error" in ready:
        raise CandidateLeft(_summary(ready["error"]))
    entry_point = job["entry_point"]
    wanted = [name for name in job["names"] if name not in namespace or name == entry_point]
    found = candidate.request("globals", wanted)
    if type(found) is not dict:
        raise CandidateGone("an answer that is no object")
    if entry_point is not None and entry_point not in found:
        raise CandidateLeft(f"NameError: {entry_point} is not defined")
    # of what the candidate gives, only what it was asked for
    namespace.update({name: found[name] for name in wanted if name in found})
    exec(test, namespace)


def _summary(error: Any) -> str:
    """An exception of the candidate on one line."""
    if not isinstance(error, dict):
        return "an exception"
    return f"{error.get('name')}: {error.get('text')}"


class _Candidate:
    """The connection to the candidate's process.

    Attributes:
        raised: whether its code has raised an exception.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.raised = False
        self._connection = connection
        self._references: dict[int, Reference] = {}

    def receive(self) -> dict[str, Any]:
        """The next message."""
        try:
            message = receive(self._connection)
        except BadFrame as error:
            raise CandidateGone(str(error)) from None
        if not isinstance(message, dict):
            raise CandidateGone("an answer that is no object")
        return message

    def request(self, operation: str, arguments: Any, keywords: Any = None) -> Any:
        """Have something done; returns plain values and references, or raises its exception.

        An answer counts only with the token of its request, so none can be sent in advance.
        """
        token = secrets.token_hex(8)
        shared = Shared()

        def form(item: Any) -> Any:
            return encode(item, self._number, shared, is_argument=True)

        message = {
            "token": token,
            "operation": operation,
            "arguments": [form(item) for item in arguments],
            "keywords": {key: form(item) for key, item in (keywords or {}).items()},
        }
        try:
            send(self._connection, message)
        except OSError as error:
            raise CandidateGone(str(error)) from None
        answer = self.receive()
        if answer.get("token") != token:
            raise CandidateGone("an answer to no question")
        try:
            shared.apply(answer.get("changes", []), self._reference)
            if "error" in answer:
                self._raise(answer["error"])
            return decode(answer.get("value"), self._reference, shared)
        except BadFrame as error:
            raise CandidateGone(str(error)) from None

    def _raise(self, error: Any) -> None:
        """Raise what the candidate raised, if it is an ordinary exception."""
        self.raised = True
        kind = error.get("kind") if isinstance(error, dict) else None
        if isinstance(kind, str) and kind in _RELAYED and isinstance(error.get("text"), str):
            raise _RELAYED[kind](error["text"])
        raise CandidateLeft(_summary(error))

    def _number(self, value: Any) -> int:
        if type(value) is not Reference:
            raise TypeError(f"a {type(value).__name__} of the test cannot be passed to a candidate")
        return int(object.__getattribute__(value, "_number"))

    def _reference(self, number: int) -> "Reference":
        return self._references.setdefault(number, Reference(self, number))


class Reference:
    """An object that stays in the candidate's process."""

    __slots__ = ("_candidate", "_number")

    def __init__(self, candidate: _Candidate, number: int) -> None:
        object.__setattr__(self, "_candidate", candidate)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call it; arguments go by value, and come back as the call has left them."""
        return self._candidate.request("call", [self, *arguments], keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.request("getattr", [self, name])

    def __setattr__(self, name: str, value: Any) -> None:
        self._candidate.request("setattr", [self, name, value])

    def __iter__(self) -> Any:
        return iter(_exactly(list, self._candidate.request("iter", [self])))

    def __len__(self) -> int:
        return int(_exactly(int, self._candidate.request("len", [self])))

    def __bool__(self) -> bool:
        return bool(_exactly(bool, self._candidate.request("bool", [self])))

    def __getitem__(self, key: Any) -> Any:
        return self._candidate.request("item", [self, key])


def _exactly(kind: type, value: Any) -> Any:
    """The value, which a candidate claims to be of a kind."""
    if type(value) is not kind:
        raise CandidateGone(f"a {type(value).__name__} where a {kind.__name__} was asked for")
    return value
