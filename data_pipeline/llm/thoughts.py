"""Takes a model's thoughts out of its answer.

Servers without a reasoning parser leave them in the content: as `<think>…</think>`, as everything
before a lone `</think>` (the template had opened the block), or without an end when the tokens ran
out. They hold drafts and doubts, and are no part of the answer.
"""

import re

_WORDS = r"think(?:ing)?|thoughts?|reasoning|reflection|scratchpad"
# Of XML, also escaped and with a prefix; Mistral's [THINK]; Kimi's ◁think▷.
_MARK = re.compile(
    rf"(?:<|&lt;)(?P<close>/?)[ \t]{{0,4}}(?:[A-Za-z]{{1,20}}[:_])?(?:{_WORDS})"
    r"(?:[ \t][^<>\n]{0,100})?(?:>|&gt;)"
    r"|(?-i:\[(?P<close2>/?)THINK\])|◁(?P<close3>/?)think▷",
    re.IGNORECASE,
)


def without_thoughts(content: str) -> str | None:
    """The answer in a content, thoughts taken out.

    Returns:
        The content itself where it holds no mark of thoughts; else what follows the last end mark.
        None where thoughts have no end, or stand in the middle of an answer: which part is the
        answer is then anybody's guess.
    """
    marks = list(_MARK.finditer(content))
    if not marks:
        return content
    closing = [bool(mark["close"] or mark["close2"] or mark["close3"]) for mark in marks]
    if not closing[-1]:
        return None
    if not closing[0] and content[: marks[0].start()].strip():
        return None
    return content[marks[-1].end() :].lstrip("\n")
