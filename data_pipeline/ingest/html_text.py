"""HTML of question-and-answer sites as Markdown text, code blocks kept to the letter.

The posts of the Stack Exchange dump hold the HTML that the site renders from Markdown. What comes
out is what a person would read: paragraphs, fenced code, lists, quotes; links keep their text and
lose their address, images vanish. Any input gives some text: there is no invalid HTML.

The tags are found by one regular expression that never backtracks, in time linear in the input.
The standard library's parser takes quadratic time on hostile input (half a minute for 256 KiB of
`<!--`) and stops at some with an AssertionError.
"""

import html as entities
import re

# A comment, or a tag: slash, name, attributes. Possessive, so that a failure costs one look.
_TAG = re.compile(r"(<!--)|<(/?+)([A-Za-z][A-Za-z0-9]*+)([^<>]*+)>|<[!?][^<>]*+>")
_CLASS = re.compile(r"""\bclass\s*+=\s*+["']?([^"'>]*+)""")
# `html.unescape` raises ValueError for thousands of digits, which name no character anyway.
_LONG_REFERENCE = re.compile(r"&#[xX]?[0-9a-fA-F]{9,}+;?")
_BLOCKS = {
    *("p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd"),
    *("table", "tr", "blockquote", "details", "summary", "section", "article"),
}
_SPACE = re.compile(r"[ \t\n\r\f]+")
_LANGUAGE = re.compile(r"\blang(?:uage)?-([a-z0-9+#]+)")
_LANGUAGES = {"py": "python", "python3": "python", "none": "", "default": ""}
_MAX_DEPTH = 8  # of lists and quotes that are shown as such


def html_to_text(html: str) -> str:
    """The text of a fragment of HTML, as Markdown without a line feed at its end."""
    gathered = _Text()
    position = 0
    while (match := _TAG.search(html, position)) is not None:
        gathered.add_text(_decode(html[position : match.start()]))
        position = match.end()
        comment, slash, name, attributes = match.groups()
        if comment:
            end = html.find("-->", position)
            if end < 0:
                return gathered.text()  # as browsers do: the rest is a comment
            position = end + 3
        elif name and slash:
            gathered.close_tag(name.lower())
        elif name:
            gathered.open_tag(name.lower(), attributes)
    gathered.add_text(_decode(html[position:]))
    return gathered.text()


def _decode(text: str) -> str:
    """Text with its character references decoded."""
    if "&" not in text:
        return text
    return entities.unescape(_LONG_REFERENCE.sub("\ufffd", text))


def fence(code: str, language: str = "") -> str:
    """A Markdown code block; its fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall("`{3,}", code)), default=2)
    marks = "`" * (longest + 1)
    return f"{marks}{language}\n{code}\n{marks}"


class _Text:
    """Gathers blocks of text."""

    def __init__(self) -> None:
        self._blocks: list[str] = []
        self._line: list[str] = []
        self._lists: list[int | None] = []  # next number of each open list, None for bullets
        self._prefix = ""  # of the next block: a bullet or heading marks
        self._quotes = 0
        self._pre: list[str] | None = None
        self._language = ""
        self._hidden = 0

    def text(self) -> str:
        """What was gathered."""
        self._end_code()
        self._end_block()
        return "\n\n".join(self._blocks)

    def open_tag(self, tag: str, attributes: str) -> None:
        """Take a start tag, its name in lower case."""
        if tag in ("script", "style"):
            self._hidden += 1
        elif tag == "pre":
            self._end_code()
            self._end_block()
            self._pre = []
            self._language = _language(attributes)
        elif self._pre is not None:
            self._language = self._language or _language(attributes)
            if tag == "br":
                self._pre.append("\n")
        elif tag == "br":
            self._line.append("\n")
        elif tag == "hr":
            self._end_block()
        elif tag in ("code", "kbd"):
            self._line.append("`")
        elif tag in ("td", "th"):
            self._line.append(" ")
        elif tag in _BLOCKS:
            self._end_block()
            self._open(tag)

    def _open(self, tag: str) -> None:
        if tag in ("ul", "ol"):
            self._lists.append(1 if tag == "ol" else None)
        elif tag == "li" and self._lists:
            number = self._lists[-1]
            indent = "  " * min(len(self._lists) - 1, _MAX_DEPTH)
            self._prefix = indent + ("- " if number is None else f"{number}. ")
            if number is not None:
                self._lists[-1] = number + 1
        elif tag == "blockquote":
            self._quotes += 1
        elif tag[0] == "h":
            self._prefix = "#" * int(tag[1]) + " "

    def close_tag(self, tag: str) -> None:
        """Take an end tag."""
        if tag in ("script", "style"):
            self._hidden = max(0, self._hidden - 1)
        elif tag == "pre":
            self._end_code()
        elif self._pre is not None:
            return
        elif tag in ("code", "kbd"):
            self._line.append("`")
        elif tag in _BLOCKS:
            self._end_block()
            self._prefix = ""
            if tag in ("ul", "ol") and self._lists:
                self._lists.pop()
            elif tag == "blockquote":
                self._quotes = max(0, self._quotes - 1)

    def add_text(self, data: str) -> None:
        """Take what stands between tags."""
        if self._hidden:
            return
        if self._pre is not None:
            self._pre.append(data)
        else:
            self._line.append(_SPACE.sub(" ", data))

    def _end_code(self) -> None:
        if self._pre is None:
            return
        code = "".join(self._pre).replace("\r\n", "\n").strip("\n")
        self._pre = None
        if code.strip():
            self._add(fence(code, self._language))

    def _end_block(self) -> None:
        lines = [_SPACE.sub(" ", line).strip() for line in "".join(self._line).split("\n")]
        self._line = []
        text = "\n".join(lines).strip()
        if text:
            self._add(self._prefix + text)
            self._prefix = ""

    def _add(self, block: str) -> None:
        if self._quotes:
            mark = "> " * min(self._quotes, _MAX_DEPTH)
            block = "\n".join((mark + line).rstrip() for line in block.split("\n"))
        self._blocks.append(block)


def _language(attributes: str) -> str:
    """The language that a class such as `lang-py prettyprint-override` names, or ""."""
    classes = _CLASS.search(attributes)
    found = _LANGUAGE.search(classes[1]) if classes else None
    return _LANGUAGES.get(found[1], found[1]) if found else ""
