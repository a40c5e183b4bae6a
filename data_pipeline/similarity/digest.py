"""The digest by which equal texts are known."""

import hashlib

_SPACE = b" \t\r\f"
_ENDS = tuple(bytes([mark]) + b"\n" for mark in _SPACE)


def text_digest(text: bytes) -> bytes:
    """SHA-256 of a text without white space at the ends of lines and of the text; 16 bytes."""
    if any(end in text for end in _ENDS):
        text = b"\n".join([line.rstrip(_SPACE) for line in text.split(b"\n")])
    return hashlib.sha256(text.strip()).digest()[:16]
