"""Reads a tokenizer.json that may come from anywhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer

MOST_BYTES = 1 << 27  # of the file; those of 256,000 entries have 33 MB
MOST_GROWTH = 64  # bytes that a normalizer may make of one; NFKD makes 11 at the worst
_PROBE = "a B\n\t1e\u0301 "


@contextmanager
def tokenizer_errors(where: Path | str) -> Iterator[None]:
    """Turn what the library raises into a `ValueError` that names the file.

    It raises plain `Exception`, and where its Rust code panics a `BaseException`.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not panic:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: not a tokenizer.json that can be read ({reason})") from None


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json.

    Its padding and truncation are switched off: they would lengthen or cut a prompt. The text of a
    special token inside a text is taken as text.

    Raises:
        ValueError: it is not usable, or its normalizer makes far more of a text than was there.
    """
    with tokenizer_errors(path):
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES} bytes")
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        if tokenizer.normalizer is not None:
            before = len(_PROBE.encode("utf-8"))
            after = len(tokenizer.normalizer.normalize_str(_PROBE).encode("utf-8"))
            if after > MOST_GROWTH * before:
                raise ValueError(f"its normalizer makes {after} bytes of {before}")
        tokenizer.encode(_PROBE, add_special_tokens=False)
    return tokenizer
