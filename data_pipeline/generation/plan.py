"""What to write: the plan of a generation, made before anything is paid.

phi-1's samples differ because their prompts do: "topics and target audience" for textbooks, "the
function name" for exercises (section 2.3 of the paper), and a few random words, as in TinyStories.
A plan is a JSONL file of such combinations, each with a stable id. It is a pure function of lists,
seed and size; each topic comes equally often. A plan of more samples than there are combinations
goes through them again, with other words each time.
"""

import hashlib
import json
import keyword
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.generation import plan_lists
from data_pipeline.generation.options import PlanRun
from data_pipeline.records.jsonl import (
    MAX_LINE_BYTES,
    LineWriter,
    open_jsonl,
    read_lines,
)
from data_pipeline.records.record import record_id
from data_pipeline.runner.finished import Finished, Show
from data_pipeline.runner.output import OtherOutput, is_made
from megaphi.durable import rename_durably

KINDS = ("textbook", "exercise")
FIELDS = {
    "textbook": ("topic", "audience", "difficulty", "style"),
    "exercise": ("topic", "name", "profession", "difficulty"),
}
WORDS_DRAWN = 3
MAX_FIELD = 200  # characters


@dataclass(frozen=True)
class Entry:
    """One sample to write.

    Attributes:
        id: stable: made of kind and fields.
        kind: `textbook` or `exercise`.
        fields: by name, as in `FIELDS`, and `words`.
    """

    id: str
    kind: str
    fields: dict[str, str]


def plan_run(run: PlanRun, show: Show) -> Finished:
    """Write a plan as the user's options say.

    Raises:
        ValueError, FileNotFoundError: a list cannot be used, or has too few values.
    """
    kind, out = run.kind.removesuffix("s"), run.output.out
    lists = default_lists(kind)
    if run.lists is not None:
        lists |= read_lists(run.lists, kind)
    entries = make_plan(kind, run.samples, lists, run.seed)
    count, sha256, reused = write_plan(out, entries, overwrite=run.output.overwrite)
    sizes = {field: len(values) for field, values in lists.items()}
    result: dict[str, Any] = {"out": str(out), "reused": reused, "samples": count}
    result |= {"lists": sizes, "sha256": sha256}
    listed = " x ".join(f"{size} {field}" for field, size in sizes.items())
    did = "reused" if reused else "planned"
    return Finished(result, f"{did} {out}: {count} {run.kind} from {listed}")


def default_lists(kind: str) -> dict[str, list[str]]:
    """The lists that come with megaphi, by field; `words` is the vocabulary that is drawn from."""
    if kind == "textbook":
        lists = {
            "topic": plan_lists.TOPICS,
            "audience": plan_lists.AUDIENCES,
            "difficulty": plan_lists.DIFFICULTIES,
            "style": plan_lists.STYLES,
        }
    else:
        names = [f"{verb}_{thing}" for verb in plan_lists.VERBS for thing in plan_lists.THINGS]
        lists = {
            "topic": plan_lists.TOPICS,
            "name": names,
            "profession": plan_lists.PROFESSIONS,
            "difficulty": plan_lists.DIFFICULTIES,
        }
    return {**lists, "words": plan_lists.WORDS}


def read_lists(path: Path, kind: str) -> dict[str, list[str]]:
    """Read lists that replace those of megaphi: YAML, `FIELD: [VALUE, …]`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or a value cannot be used.
    """
    try:
        table: Any = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected lines `FIELD: [VALUE, ...]`")
    known = (*FIELDS[kind], "words")
    for field, values in table.items():
        where = f"{path}: {field}"
        if field not in known:
            raise ValueError(f"{where}: unknown; a plan of kind {kind} has {', '.join(known)}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: expected a list")
        for value in values:
            if not isinstance(value, str) or not 0 < len(value) <= MAX_FIELD or "\n" in value:
                raise ValueError(f"{where}: {value!r}: expected one line of text")
            if field == "name" and (not value.isidentifier() or keyword.iskeyword(value)):
                raise ValueError(f"{where}: {value!r} cannot be the name of a function")
        if len(set(values)) < len(values):
            raise ValueError(f"{where}: holds a value twice")
    return table


def make_plan(
    kind: str, samples: int, lists: Mapping[str, Sequence[str]], seed: int
) -> Iterator[Entry]:
    """Yield the entries of a plan, in the order in which they are to be written.

    Args:
        kind: `textbook` or `exercise`.
        samples: how many.
        lists: by field, and `words`.
        seed: of the drawing.

    Raises:
        ValueError: fewer distinct combinations exist than samples are asked for.
    """
    first, *others = FIELDS[kind]
    combinations = math.prod(len(lists[field]) for field in others)
    topics, drawn = len(lists[first]), min(WORDS_DRAWN, len(lists["words"]))
    draws = math.comb(len(lists["words"]), drawn)
    if samples < 1:
        raise ValueError(f"`samples` {samples}: at least 1 is needed")
    if samples > topics * combinations * draws:
        raise ValueError(
            f"`samples` {samples}: the lists give {topics * combinations * draws} distinct "
            f"combinations, {draws} choices of {drawn} words counted in; give longer ones with "
            "`lists`, or ask for fewer"
        )
    order = list(lists[first])
    random.Random(f"{seed}").shuffle(order)
    for number in range(samples):
        turn, place = divmod(number, topics)
        again, turn = divmod(turn, combinations)
        fields = {first: order[place]}
        rest = permuted(turn, combinations, f"{seed}/{order[place]}")
        for field in others:
            rest, index = divmod(rest, len(lists[field]))
            fields[field] = lists[field][index]
        key = json.dumps([seed, *fields.values()])
        choice = _choice(permuted(again, draws, key), len(lists["words"]), drawn)
        words = [lists["words"][index] for index in choice]
        random.Random(key).shuffle(words)
        fields["words"] = ", ".join(words)
        yield Entry(record_id(kind, json.dumps(fields, sort_keys=True)), kind, fields)


def _choice(rank: int, size: int, count: int) -> list[int]:
    """The `rank`-th way to choose `count` of `size` things (combinatorial number system)."""
    chosen = []
    for left in range(count, 0, -1):
        size -= 1
        while math.comb(size, left) > rank:
            size -= 1
        rank -= math.comb(size, left)
        chosen.append(size)
    return chosen


def permuted(index: int, size: int, key: str) -> int:
    """Where a pseudo-random permutation of 0 to `size` - 1 takes `index`.

    A Feistel network on just enough bits, walked until it lands inside (Black and Rogaway, 2002):
    nothing is listed, and a longer plan continues where a shorter one of the same seed ends.
    """
    half = ((size - 1).bit_length() + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            text = f"{key}/{turn}/{right}".encode()
            mixed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
            left, right = right, left ^ (mixed & mask)
        index = left << half | right
        if index < size:
            return index


def write_plan(
    path: Path, entries: Iterator[Entry], *, overwrite: bool = False
) -> tuple[int, str, bool]:
    """Write a plan.

    Args:
        path: of the plan.
        entries: of it, in order.
        overwrite: replace a file of other content: another plan, or one edited by hand.

    Returns:
        The number of entries, the SHA-256 of the file, and whether it was there already.

    Raises:
        ValueError: something else has that name.
    """
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name the file of the plan")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with LineWriter(partial) as writer:
        for entry in entries:
            line = {"id": entry.id, "kind": entry.kind, **entry.fields}
            writer.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
    try:
        same = is_made(path, writer.sha256, "plan", overwrite=overwrite)
    except OtherOutput:
        partial.unlink()
        raise
    rename_durably(partial, path)
    return writer.lines, writer.sha256, same


def read_plan(path: Path) -> Iterator[Entry]:
    """Yield the entries of a plan file, which may have been edited by hand.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no entry, or an id comes twice.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such plan; make one with `megaphi data plan-generation`"
        )
    seen: set[str] = set()
    with open_jsonl(path) as stream:
        for number, (_, line) in enumerate(read_lines(stream), start=1):
            where = f"{path}:{number}"
            if line is None:
                raise ValueError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
            entry = _read_entry(line, where)
            if entry.id in seen:
                raise ValueError(f"{where}: the id {entry.id} comes twice")
            seen.add(entry.id)
            yield entry


def _read_entry(line: bytes, where: str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: not a JSON line") from None
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        raise ValueError(f"{where}: not an entry of a plan: `kind` must be one of {KINDS}")
    wanted = ("id", *FIELDS[value["kind"]], "words")
    for key in wanted:
        if not isinstance(value.get(key), str) or not value[key].isprintable():
            raise ValueError(f"{where}: {key}: expected one line of text")
    if "name" in wanted and not value["name"].isidentifier():
        raise ValueError(f"{where}: name: {value['name']!r} cannot be the name of a function")
    return Entry(value["id"], value["kind"], {key: value[key] for key in wanted if key != "id"})
