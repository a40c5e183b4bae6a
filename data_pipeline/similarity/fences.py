"""Fenced code blocks of Markdown, in linear time, whoever wrote the text."""

import io
import re

_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})[ \t]*([A-Za-z0-9_]*)[^\n]*\n?")


def split_fences(text: str, *, unended: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Split a Markdown text into prose and fenced blocks (CommonMark, section 4.5).

    A block ends at a fence of the same character that is at least as long as the one that opened
    it. Linear in the text, whoever wrote it.

    Args:
        text: the text.
        unended: count a block that does not end too, up to the end of the text.

    Returns:
        The prose, and the (language in lower case, code) of each block.
    """
    prose: list[str] = []
    blocks: list[tuple[str, str]] = []
    opened: re.Match[str] | None = None
    inside: list[str] = []
    for line in io.StringIO(text, newline="\n"):
        fence = _FENCE.fullmatch(line)
        if opened is None:
            if fence is None:
                prose.append(line)
            else:
                opened, inside = fence, []
        elif fence and line.strip() == fence[1] and fence[1].startswith(opened[1]):
            blocks.append((opened[2].lower(), "".join(inside)))
            opened = None
        else:
            inside.append(line)
    if opened is not None and unended:
        blocks.append((opened[2].lower(), "".join(inside)))
    return "".join(prose), blocks
