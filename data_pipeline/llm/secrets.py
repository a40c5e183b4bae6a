"""API keys: where they may come from, and how they stay out of logs, files and messages.

A key is read from an environment variable or from a file that only its owner can read, never from
the command line. It is held in a `Secret`, whose text form is redacted; only the HTTP transport
takes the value out. What a server sends back passes through `Redactor`, since some servers quote
the Authorization header in their errors.
"""

import base64
import logging
import os
import re
import stat
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from megaphi.errors import RunError

REDACTED = "[API key]"
MIN_KEY_LENGTH = 8  # a shorter one would be found all over harmless text
MAX_KEY_BYTES = 8192
_KEY = re.compile(r"[\x21-\x7e]+")  # what may stand in a header: no space, no line end


class Secret:
    """A string that prints as `Secret(redacted)`, cannot be pickled and is compared by nobody."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself; for the transport and the redactor only."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(redacted)"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("a secret cannot be pickled")


def read_key(variable: str | None, file: Path | None) -> Secret | None:
    """Read an API key.

    Args:
        variable: environment variable that may hold it.
        file: file that holds it, which comes first.

    Returns:
        The key, or None when neither is there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: others than its owner can read the file, or its content is no key.
    """
    if file is not None:
        where, text = str(file), _read_private(file)
    elif variable is not None and os.environ.get(variable):
        where, text = f"environment variable {variable}", os.environ[variable]
    else:
        return None
    text = text.strip()
    # The messages do not quote what was found: it may be a key with a typing error.
    if not _KEY.fullmatch(text):
        raise ValueError(f"{where}: not an API key (one word of printable ASCII is expected)")
    if len(text) < MIN_KEY_LENGTH:
        raise ValueError(f"{where}: an API key has at least {MIN_KEY_LENGTH} characters")
    return Secret(text)


def _read_private(file: Path) -> str:
    """The text of a file that only its owner can read."""
    with file.open("rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{file}: not a regular file")
        if status.st_mode & 0o077:
            raise ValueError(f"{file}: others can read the key; run `chmod 600 {file}`")
        if status.st_uid != os.geteuid():
            raise ValueError(f"{file}: belongs to another user")
        return stream.read(MAX_KEY_BYTES).decode("utf-8", "replace")


class Redactor:
    """Replaces keys in a text: plain, URL-quoted, in Base64 (at any alignment) and hexadecimal.

    Args:
        secrets: the keys in use.
    """

    def __init__(self, secrets: list[Secret]) -> None:
        forms = sorted({form for secret in secrets for form in _forms(secret)}, key=len)
        pattern = "|".join(re.escape(form) for form in reversed(forms))
        self._pattern = re.compile(pattern, re.IGNORECASE) if forms else None

    def __call__(self, text: str) -> str:
        """The text with every form of a key replaced."""
        return text if self._pattern is None else self._pattern.sub(REDACTED, text)

    def finds(self, text: str) -> bool:
        """Whether a form of a key stands in the text."""
        return self._pattern is not None and self._pattern.search(text) is not None


def _forms(secret: Secret) -> Iterator[str]:
    value = secret.reveal()
    data = value.encode("ascii")
    yield value
    yield quote(value, safe="")
    yield "".join(f"%{byte:02x}" for byte in data)
    yield data.hex()
    for offset in range(3):
        # The Base64 of a text that holds the key: the characters at both ends also depend on
        # what stands alongside the key.
        padded = b"\0" * offset + data
        whole = len(padded) - len(padded) % 3
        start = (offset * 8 + 5) // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(padded[:whole]).decode("ascii")[start:]


def _traceback_text(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@contextmanager
def guarded(redact: Redactor) -> Iterator[None]:
    """Keep the keys out of everything that leaves the block: log records and exceptions.

    Log records of every library are redacted as they are made, their tracebacks included, so that
    no handler sees a key, whoever added it. An exception whose traceback shows a key is replaced.

    Raises:
        RunError: in the place of an exception that quoted a key.
    """
    make_record = logging.getLogRecordFactory()
    formatter = logging.Formatter()

    def make_redacted(*arguments: object, **keywords: object) -> logging.LogRecord:
        record = make_record(*arguments, **keywords)
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info:
            # Handlers print `exc_text` where there is one; the exception itself goes no further.
            record.exc_text = redact(formatter.formatException(record.exc_info))
            record.exc_info = None
        return record

    logging.setLogRecordFactory(make_redacted)
    try:
        yield
    except Exception as error:
        if not redact.finds(_traceback_text(error)):
            raise
        message = redact(" ".join(str(error).split()))
        raise RunError(f"{type(error).__name__}: {message}") from None
    finally:
        logging.setLogRecordFactory(make_record)
