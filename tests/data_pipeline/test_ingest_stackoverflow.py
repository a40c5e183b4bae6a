"""Posts.xml: which questions and answers become which text, every row accounted for."""

import io
import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

from data_pipeline.ingest import stackoverflow
from data_pipeline.ingest.html_text import html_to_text
from data_pipeline.ingest.licenses import FilterFiles
from data_pipeline.ingest.stackoverflow import parse_rows
from data_pipeline.ingest.stage import IngestOptions, plan_ingest
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options, run_stage
from megaphi.errors import RunError
from tests.data_pipeline.record_files import read

Post = dict[str, Any]


def question(number: int, **more: Any) -> Post:
    post = {
        "Id": number,
        "PostTypeId": 1,
        "Score": 5,
        "Title": f"Title {number}",
        "Body": "<p>Q</p>",
    }
    return {**post, "Tags": "<python><list>", "ContentLicense": "CC BY-SA 4.0", **more}


def answer(number: int, parent: int, **more: Any) -> Post:
    post = {"Id": number, "PostTypeId": 2, "ParentId": parent, "Score": 3}
    return {**post, "Body": f"<p>A{number}</p>", "ContentLicense": "CC BY-SA 4.0", **more}


def posts_xml(posts: list[Post]) -> bytes:
    """The file as the dump has it: byte order mark, declaration, one row a line."""
    rows = "".join(
        f"  <row {' '.join(f'{k}={quoteattr(str(v))}' for k, v in post.items())} />\r\n"
        for post in posts
    )
    declaration = '<?xml version="1.0" encoding="utf-8"?>\r\n'
    return f"\ufeff{declaration}<posts>\r\n{rows}</posts>".encode()


def run(data: bytes, root: Path, out: str = "out", **options: Any) -> Manifest:
    path = root / "Posts.xml"
    path.write_bytes(data)
    return ingest(path, root / out, **options)


def ingest(path: Path, out: Path, **options: Any) -> Manifest:
    stage, work = plan_ingest([str(path)], IngestOptions(**options))
    return run_stage(stage, work, out, Options(max_reject=1))[0]


GOLDEN = [
    question(
        4,
        Title="How  to &amp; reverse?",
        Tags="|python|list|",
        AcceptedAnswerId=9,
        OwnerUserId=7,
        CreationDate="2008-07-31T21:42:52.667",
        Body="<p>I have <code>x &lt; y</code> &amp; a <a href='http://e.x'>link</a>.</p>\n\n"
        "<pre class='lang-py prettyprint-override'><code>for i in range(3):\n    print(i) # &gt;\n"
        "</code></pre>\n<ul>\n<li>one</li>\n<li><p>two</p></li></ul>",
    ),
    answer(6, 4, Score=40, OwnerDisplayName="gone", ContentLicense="CC BY-SA 2.5"),
    answer(7, 4, Score=0),
    answer(9, 4, Score=-2, Body="<blockquote><p>quoted<br>twice</p></blockquote><p>Use it</p>"),
    answer(10, 4, Score=50),
    question(11, Tags="<java>"),
    answer(12, 11),
    {"Id": 13, "PostTypeId": 5, "Body": "a tag's wiki"},
    question(14),
    question(15),
    answer(16, 15, Score=0),
    question(20, Title="late"),
    answer(19, 30, Score=2),  # older than its question, as after a merge of questions
    answer(21, 99, Score=2),  # whose question is not in the dump
    question(30, Title="merged"),
    {"Id": "x", "PostTypeId": 1},
    {"PostTypeId": 2, "Id": 31},
]

GOLDEN_TEXT = """# How to &amp; reverse?

I have `x < y` & a link.

```python
for i in range(3):
    print(i) # >
```

- one

- two

## Answer

> quoted
> twice

Use it

## Answer

A10
"""


def test_golden_posts(tmp_path: Path) -> None:
    manifest = run(posts_xml(GOLDEN), tmp_path, max_answers=2)
    first, merged = read(tmp_path / "out")
    assert first["text"] == GOLDEN_TEXT
    assert (first["url"], first["source"]) == (
        "https://stackoverflow.com/questions/4",
        "stackoverflow",
    )
    assert first["license"] == "CC-BY-SA-4.0"
    assert first["meta"] == {
        "question": 4,
        "score": 5,
        "author": "7",
        "created": "2008-07-31T21:42:52.667",
        "tags": ["python", "list"],
        "answers": [
            {"id": 9, "score": -2, "accepted": True, "author": ""},
            {"id": 10, "score": 50, "accepted": False, "author": ""},
        ],
    }
    assert merged["text"] == "# merged\n\nQ\n\n## Answer\n\nA19\n"
    assert manifest.rejected == {"low_score": 1, "malformed": 2, "no_answer": 2}
    assert manifest.records_in == 2 + 5
    (counts,) = json.loads((tmp_path / "out" / "posts.json").read_bytes())
    assert counts["rows"] == len(GOLDEN) == sum(counts["counts"].values())
    assert counts["counts"] == {
        "question": 5,
        "not_tagged": 1,
        "other_post": 1,
        "malformed": 2,
        "answer_used": 3,
        "answer_low_score": 2,
        "answer_beyond_maximum": 1,
        "answer_of_other_question": 2,
    }


def test_options_choose_posts(tmp_path: Path) -> None:
    data = posts_xml(GOLDEN)
    run(data, tmp_path, "three", max_answers=3)
    first = read(tmp_path / "three")[0]
    assert [a["id"] for a in first["meta"]["answers"]] == [9, 10, 6]
    assert first["license"] == "CC-BY-SA-2.5 AND CC-BY-SA-4.0"
    assert run(data, tmp_path, "java", tags=["Java"]).records_out == 1
    strict = run(data, tmp_path, "strict", min_score=45)
    assert [a["id"] for a in read(tmp_path / "strict")[0]["meta"]["answers"]] == [9, 10]
    assert strict.rejected == {"low_score": 2, "malformed": 2, "no_answer": 2}
    with pytest.raises(RunError, match="license 2"):  # share-alike is not permissive
        run(data, tmp_path, "free", filters=FilterFiles(licenses="permissive"))


def test_posts_from_a_7z_give_the_same_records(tmp_path: Path) -> None:
    py7zr = pytest.importorskip("py7zr")
    data = posts_xml(GOLDEN + [question(100 + n, Body=f"<p>{n}</p>" * 9) for n in range(2000)])
    run(data, tmp_path, "plain", limit=1500)
    for number, filters in enumerate(
        (None, [{"id": py7zr.FILTER_BZIP2}], [{"id": py7zr.FILTER_LZMA}])
    ):
        path = tmp_path / f"site{number}.7z"
        with py7zr.SevenZipFile(path, "w", filters=filters) as archive:
            archive.writestr(data, "Posts.xml")
            archive.writestr(b"<users/>", "Users.xml")
        out = tmp_path / f"packed{number}"
        ingest(path, out, limit=1500)
        for kind in ("part", "rejected"):
            plain = read(tmp_path / "plain", kind)
            packed = read(out, kind)
            for row in (*plain, *packed):
                row.pop("id" if "position" in row else "lineage")
                row.pop("position", None)
            assert packed == plain
            assert plain
    torn = tmp_path / "torn.7z"
    torn.write_bytes((tmp_path / "site0.7z").read_bytes()[:-10])
    with pytest.raises((RunError, ValueError)):
        ingest(torn, tmp_path / "torn", format="stackoverflow")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (posts_xml(GOLDEN)[:-20], "is the file complete"),
        (posts_xml(GOLDEN).replace(b"Score", b"\xffcore"), "not well-formed"),
        (b"<users><row Id='1'/></users>", "not a Posts.xml"),
        (b"<posts><row Id='1'><b/></row></posts>", "not a Posts.xml"),
        (b"", "is the file complete"),
        (posts_xml([question(5), question(4)]), "not in the order of Id"),
        (
            b'<!DOCTYPE p [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
            b"<posts><row Id='1' PostTypeId='1' Body='&b;'/></posts>",
            "DOCTYPE",
        ),
        (
            b'<!DOCTYPE p [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
            b"<posts><row Id='1' PostTypeId='1' Body='x'/>&a;</posts>",
            "DOCTYPE",
        ),
        (b"<!DOCTYPE p SYSTEM 'http://127.0.0.1/x'><posts/>", "DOCTYPE"),
    ],
)
def test_a_broken_or_hostile_file_stops_the_run(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        run(data, tmp_path)
    assert "Posts.xml" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_huge_row_is_refused_early() -> None:
    """A row without end would be held in memory, and expat before 2.6 takes quadratic time."""

    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return b"<posts><row Body='" if self.given == size else b"x" * size

    stream = Endless()
    with pytest.raises(RunError, match="longer"):
        list(parse_rows(stream, "Posts.xml"))
    assert stream.given < 2 * stackoverflow.MAX_ROW_BYTES


def test_memory_does_not_grow_with_the_dump(tmp_path: Path) -> None:
    import tracemalloc

    def peak(count: int) -> int:
        rows = (
            f'<row Id="{n}" PostTypeId="{1 + n % 2}" ParentId="{n - 1}" Score="9" Title="t" '
            f'Tags="|python|" Body="{"x" * 20000}"/>\n'
            for n in range(2, count)
        )
        path = tmp_path / f"{count}.xml"
        with path.open("w") as stream:
            stream.write("<posts>")
            stream.writelines(rows)
            stream.write("</posts>")
        stage, work = plan_ingest([str(path)], IngestOptions())
        tracemalloc.start()
        run_stage(stage, work, tmp_path / f"out{count}", Options())
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small, large = peak(150), peak(750)
    assert (tmp_path / "750.xml").stat().st_size > 14e6
    assert large < small + 2e6


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<pre><code>a ``` b\n</code></pre>", "````\na ``` b\n````"),
        ("<pre>x = 1<br>y</pre>", "```\nx = 1\ny\n```"),
        ("<p>a\n b</p>c<script>alert(1)</script>", "a b\n\nc"),
        ("<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>", "1. a\n\n  - b\n\n2. c"),
        ("<h2>Head</h2>&#20013;&hearts;&nbsp;x", "## Head\n\n中♥\xa0x"),
        ("<blockquote><pre><code>q\n\nr</code></pre></blockquote>", "> ```\n> q\n>\n> r\n> ```"),
        ("</p></ul></pre><li>loose <b>un<i>closed", "loose unclosed"),
        ("<img src=x onerror=y><pre><code></code></pre>", ""),
        ("a <code>x</code>, <kbd>Q</kbd> &lt;b&gt;", "a `x`, `Q` <b>"),
    ],
)
def test_html_becomes_text(html: str, text: str) -> None:
    assert html_to_text(html) == text


HOSTILE = ("<![", "<!--", "<a ", "</", "&#x", "<pre>", "<ul><li>", "<p a='", "a", "&", "<a\t", "9")


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_html_ends(unit: str) -> None:
    """Milliseconds each; a quadratic parser needs minutes, or stops with an error of its own."""
    text = html_to_text("<b>start</b>" + unit * (stackoverflow.MAX_BODY // len(unit)))
    assert text.startswith("start")
    assert len(text) <= 2 * stackoverflow.MAX_BODY
