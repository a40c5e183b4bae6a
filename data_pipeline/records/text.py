"""Bytes to text, and which texts are fit for a tokenizer.

A text that passes is valid Unicode without NUL and without surrogates, so that every library
downstream takes it, and has no word that byte-pair encoding would choke on.
"""

import codecs
import re

LONG_WORD = 65_536  # characters

# PEP 263: the encoding is declared in the first or second line, which is then a comment or blank.
_COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)", re.ASCII)
_BLANK = re.compile(rb"^[ \t\f]*(?:[#\r\n]|$)", re.ASCII)
# Text encodings of Python that are no character sets: no source file is written in them, and
# decoding hostile input with some takes quadratic time.
_NOT_CHARACTER_SETS = {
    *("idna", "mbcs", "oem", "palmos", "punycode"),
    *("raw-unicode-escape", "undefined", "unicode-escape"),
}


class DocumentError(Exception):
    """A document is not accepted; carries the reason and the detail of its reject."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def decode_python(data: bytes) -> str:
    """Decode a Python source file as the language defines it (PEP 263).

    UTF-8, with or without byte order mark, unless the first two lines declare another encoding.

    Raises:
        DocumentError: `utf8` or `encoding`.
    """
    encoding = None if data.startswith(codecs.BOM_UTF8) else _declared_encoding(data)
    try:
        return data.decode("utf-8-sig" if encoding is None else encoding)
    except UnicodeError as error:
        if encoding is None:
            raise DocumentError("utf8", str(error)) from None
        raise DocumentError("encoding", f"does not fit the declared encoding: {error}") from None


def _declared_encoding(data: bytes) -> str | None:
    """The encoding of a PEP 263 comment, None for UTF-8.

    Raises:
        DocumentError: `encoding`, when Python does not know it.
    """
    for line in data[:4096].split(b"\n", 2)[:2]:
        match = _COOKIE.match(line)
        if match:
            name = match[1].decode("ascii")
            break
        if not _BLANK.match(line):
            return None
    else:
        return None
    try:
        codec = codecs.lookup(name)
    except LookupError:
        raise DocumentError("encoding", f"the declared encoding {name!r} is unknown") from None
    # The flag is what bytes.decode itself consults to refuse codecs such as rot13 and zlib.
    if not codec._is_text_encoding or codec.name.replace("_", "-") in _NOT_CHARACTER_SETS:
        raise DocumentError("encoding", f"the declared encoding {name!r} is no character set")
    return None if codec.name == "utf-8" else codec.name


def check_text(text: str, min_bytes: int) -> str:
    """Normalise line ends and refuse what must not reach a tokenizer.

    Raises:
        DocumentError: with the reason.
    """
    if "\0" in text:
        raise DocumentError("nul", f"NUL at character {text.index(chr(0))}")
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DocumentError("surrogate", f"half a character at {error.start}") from None
    if not text or text.isspace():
        raise DocumentError("empty", f"{size} bytes of white space")
    if size < min_bytes:
        raise DocumentError("too_small", f"{size} bytes, below {min_bytes}")
    if len(text) > LONG_WORD:
        longest = max(map(len, text.split()))
        if longest > LONG_WORD:
            raise DocumentError("long_word", f"{longest} characters without white space")
    return text
