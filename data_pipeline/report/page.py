"""The report as one HTML page: no request leaves it, and no text of the corpus can act in it.

Everything quoted is escaped, and a content security policy admits nothing but the page's own style
and the one script whose hash it names, so that a document which holds markup stays text.
"""

import base64
import hashlib
import re
from collections.abc import Callable, Sequence
from html import escape

from data_pipeline.records.record import Json
from data_pipeline.report.plots import COLOURS, bars, lines

_SCRIPT = """
const field = document.getElementById("search");
const shown = document.getElementById("shown");
const examples = [...document.querySelectorAll("details.example")];
const haystacks = examples.map(e => e.textContent.toLowerCase());
function search() {
  const words = field.value.toLowerCase().split(/\\s+/).filter(w => w);
  let count = 0;
  examples.forEach((example, place) => {
    const fits = words.every(word => haystacks[place].includes(word));
    example.hidden = !fits;
    count += fits;
  });
  shown.textContent = `${count} of ${examples.length}`;
}
field.addEventListener("input", search);
// report.html#words opens with these words looked for, so that a finding can be passed on
field.value = decodeURIComponent(location.hash.slice(1));
search();
"""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0; }
th, td { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; max-width: 40rem; font-size: 11px; fill: currentColor; display: block; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886; padding: .5rem; }
.columns { display: flex; flex-wrap: wrap; gap: 2rem; }
.key { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
.note { opacity: .75; }
input { font: inherit; width: 20rem; max-width: 100%; }
"""

# percentages and shares are text, and line up as numbers do
_LIKE_A_NUMBER = re.compile(r"[\d,.]+%( of [\d,]+)?|-")

Corpora = Sequence[dict[str, Json]]


def render(report: dict[str, Json]) -> str:
    """The page of a report (see `corpus_measures`)."""
    corpora: Corpora = report["corpora"]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = "".join(
        section(corpora)
        for section in (
            _summary,
            _duplicates,
            _shared,
            _growth,
            _coverage,
            _frequent,
            _lengths,
            _examples,
        )
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><title>Corpus report</title>'
        f"<style>{_STYLE}</style></head><body><h1>Corpus report</h1>{sections}"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
    # Half a character, which JSON can carry, cannot be written as UTF-8.
    return page.encode("utf-8", "replace").decode("utf-8")


def _text(value: Json) -> str:
    """A value as escaped text; numbers with separators, nothing as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return escape(str(value))
    return f"{value:,}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Json]]) -> str:
    """A table; a column is aligned like its last cell."""

    def line(tag: str, cells: Sequence[Json]) -> str:
        like = rows[-1] if tag == "th" and rows else cells
        kinds = (" class=number" if _is_number(value) else "" for value in like)
        pairs = zip(kinds, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{k}>{_text(c)}</{tag}>" for k, c in pairs) + "</tr>"

    return f"<table>{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"


def _is_number(value: Json) -> bool:
    return not isinstance(value, str) or _LIKE_A_NUMBER.fullmatch(value) is not None


def _percent(share: Json) -> str:
    return "-" if share is None else f"{share:.1%}"


def _legend(corpora: Corpora) -> str:
    if len(corpora) == 1:
        return ""
    keys = (
        f'<span class="key" style="background:{colour}"></span>{_text(corpus["label"])} '
        for colour, corpus in zip(COLOURS, corpora, strict=False)
    )
    return f"<p>{''.join(keys)}</p>"


def _summary(corpora: Corpora) -> str:
    """The one table that says how much of the corpus repeats."""

    def level(corpus: dict[str, Json], jaccard: float | None) -> str:
        entry = next(e for e in corpus["near_duplicates"] if e["jaccard"] == jaccard)
        return _percent(entry["redundant_share"])

    rows: list[tuple[str, Callable[[dict[str, Json]], Json]]] = [
        ("documents", lambda c: c["documents"]),
        ("bytes", lambda c: c["bytes"]),
        ("compression, 128 MiB window", lambda c: c["compression"]["ratio"]),
        ("exact copies", lambda c: level(c, None)),
        ("near copies, Jaccard 0.85", lambda c: level(c, 0.85)),
        ("distinct skeletons of documents", lambda c: _unique(c, "documents")),
        ("distinct skeletons of functions", lambda c: _unique(c, "functions")),
        ("10-grams that another document has", lambda c: _percent(c["ngrams"]["mean_share"])),
        ("documents that do not parse as Python", lambda c: c["skeletons"]["unparsed"]),
    ]
    head = ["", *(corpus["label"] for corpus in corpora)]
    return _table(head, [[name, *(measure(c) for c in corpora)] for name, measure in rows])


def _unique(corpus: dict[str, Json], name: str) -> str:
    entry = corpus["skeletons"][name]
    return f"{entry['unique_share']:.1%} of {entry['parsed']:,}"


def _grouped(
    corpora: Corpora, histograms: Sequence[dict[str, int]], key: Callable[[str], float]
) -> str:
    labels = sorted({label for histogram in histograms for label in histogram}, key=key)
    return _legend(corpora) + bars(labels, [[h.get(n, 0) for n in labels] for h in histograms])


def _duplicates(corpora: Corpora) -> str:
    parts = ["<h2>Near duplicates</h2>"]
    for corpus in corpora:
        rows = [
            [
                "exact" if entry["jaccard"] is None else f"{entry['jaccard']:g}",
                entry["clusters"],
                entry["in_clusters"],
                _percent(entry["redundant_share"]),
                entry["largest"],
            ]
            for entry in corpus["near_duplicates"]
        ]
        head = ["Jaccard", "clusters", "documents with a twin", "redundant", "largest cluster"]
        parts.append(f"<h3>{_text(corpus['label'])}</h3>{_table(head, rows)}")
    parts.append("<h3>Clusters by size, Jaccard 0.7</h3>")
    sizes = [
        next(e for e in corpus["near_duplicates"] if e["jaccard"] == 0.7)["cluster_sizes"]
        for corpus in corpora
    ]
    parts.append(_grouped(corpora, sizes, lambda label: int(label.split("-")[0])))
    return "".join(parts)


def _shared(corpora: Corpora) -> str:
    histograms = [
        {f"{10 * n}%": count for n, count in enumerate(corpus["ngrams"]["histogram"])}
        for corpus in corpora
    ]
    rows = [
        [corpus["label"], source, _percent(share)]
        for corpus in corpora
        for source, share in corpus["ngrams"]["by_source"].items()
    ]
    return (
        "<h2>10-grams shared with another document</h2>"
        '<p class="note">documents, by the share of their 10-grams that another one has</p>'
        + _grouped(corpora, histograms, lambda label: int(label[:-1]))
        + _table(["corpus", "source", "mean share"], rows)
    )


def _growth(corpora: Corpora) -> str:
    series = [
        [(point["documents"], point["new_per_1000"]) for point in corpus["growth"]["points"]]
        for corpus in corpora
    ]
    return (
        "<h2>Growth</h2>"
        '<p class="note">new clusters (Jaccard 0.85) per 1,000 documents, in the order of the '
        "corpus: where it falls, more of the same adds little</p>"
        + _legend(corpora)
        + lines(series, 1000, "documents")
    )


def _coverage(corpora: Corpora) -> str:
    parts = ["<h2>Coverage: topic by audience by difficulty</h2>"]
    for corpus in corpora:
        coverage = corpus["coverage"]
        parts.append(f"<h3>{_text(corpus['label'])}</h3>")
        if coverage is None:
            parts.append("<p>No record says what it is about.</p>")
            continue
        parts.append(
            f"<p>{coverage['cells']:,} cells, {coverage['empty_cells']:,} of them empty; entropy "
            f"{coverage['entropy']['bits']:g} bits, {coverage['entropy']['of_even']:.1%} of even "
            '</p><div class="columns">'
        )
        for key, axis in coverage["axes"].items():
            top = list(axis["counts"].items())[:15]
            head = [f"{key} ({len(axis['counts'])})", "documents"]
            parts.append(_table(head, [[value or "(none)", count] for value, count in top]))
        parts.append("</div>")
        largest = [[" · ".join(c["cell"]), c["documents"]] for c in coverage["largest"][:10]]
        parts.append(_table(["largest cells", "documents"], largest))
        empty = [[" · ".join(cell)] for cell in coverage["some_empty"][:10]]
        if empty:
            parts.append(_table(["some empty cells"], empty))
    return "".join(parts)


def _frequent(corpora: Corpora) -> str:
    parts = []
    for name, title in (
        ("names", "Function names"),
        ("imports", "Imports (documents)"),
        ("licenses", "Licences"),
        ("languages", "Languages"),
    ):
        parts.append(f'<h2>{title}</h2><div class="columns">')
        for corpus in corpora:
            entry = corpus[name]
            evenness = "" if entry["entropy"] is None else f", {entry['entropy']['bits']:g} bits"
            parts.append(
                f"<div><h3>{_text(corpus['label'])}</h3><p>{entry['distinct']:,} distinct, "
                f"{entry['once']:,} once{evenness}</p>"
            )
            rows = [[value or "(none)", count] for value, count in entry["top"]]
            parts.append(_table(["", "count"], rows) + "</div>")
        parts.append("</div>")
    return "".join(parts)


def _lengths(corpora: Corpora) -> str:
    histograms = [corpus["lengths"]["histogram"] for corpus in corpora]
    quantiles = [
        [corpus["label"], corpus["lengths"]["mean"], *corpus["lengths"]["quantiles"].values()]
        for corpus in corpora
    ]
    head = ["bytes", "mean", *(f"{q}%" for q in corpora[0]["lengths"]["quantiles"])]
    return (
        '<h2>Lengths</h2><p class="note">documents of up to so many bytes</p>'
        + _grouped(corpora, histograms, int)
        + _table(head, quantiles)
    )


def _examples(corpora: Corpora) -> str:
    parts = [
        '<h2>Examples</h2><p><input id="search" type="search" placeholder="words to look for" '
        'aria-label="search the examples"> <span id="shown"></span></p>'
    ]
    for corpus in corpora:
        for example in corpus["examples"]:
            facts = [
                corpus["label"],
                example["source"],
                example["path"] or example["id"],
                example["license"],
                example["cell"],
                f"cluster of {example['cluster_size']}",
                f"{_percent(example['shared_ngrams'])} of 10-grams shared",
            ]
            parts.append(
                f'<details class="example"><summary>{" | ".join(_text(f) for f in facts if f)}'
                f"</summary><pre>{_text(example['text'])}</pre></details>"
            )
    return "".join(parts)
