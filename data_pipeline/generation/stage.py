"""Writes textbook sections and exercises: a plan in, records out.

All answers go through the ledger first. The records are then made from plan and ledger alone, in
the order of the plan, so that they are the same however often the run was killed and in whatever
order the server answered. Each sample that was asked for is kept, or rejected with a reason.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from data_pipeline.generation.check import check_exercise, check_textbook
from data_pipeline.generation.near_duplicates import NearDuplicateGate
from data_pipeline.generation.plan import Entry, read_plan
from data_pipeline.llm.ask import Failure, Outcome
from data_pipeline.llm.completion import Request
from data_pipeline.llm.ledger import Ledger
from data_pipeline.llm.parameters import Adjustments
from data_pipeline.llm.patience import Patience
from data_pipeline.llm.prices import Price
from data_pipeline.llm.prompts import DEFAULT_PROMPTS, write_request
from data_pipeline.llm.secrets import Redactor
from data_pipeline.llm.session import (
    REPORT_NAME,
    Estimate,
    Progress,
    Sending,
    Server,
    ask_server,
    traffic_report,
)
from data_pipeline.records.jsonl import file_sha256
from data_pipeline.records.record import Json, Record, Reject, digest
from data_pipeline.records.text import DocumentError
from data_pipeline.runner.output import (
    Manifest,
    write_json,
)
from data_pipeline.runner.stage import Options, Stage, Tally, Work, finished_output, run_stage
from megaphi.errors import RunError

VERSION = "2"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What is asked for and what is accepted.

    Attributes:
        model: who writes.
        prompts: template by kind.
        max_tokens: most tokens of an answer.
        temperature: of the sampling.
        seed: sent to the server; None leaves it out.
        min_words: of prose in a textbook section.
        window: samples in a stretch of the growth curve.
        stop_below: see `NearDuplicateGate`.
        adjustments: of every request.
    """

    model: str
    prompts: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_PROMPTS))
    max_tokens: int = 1024
    temperature: float = 1.0
    seed: int | None = None
    min_words: int = 80
    window: int = 1000
    stop_below: float = 0.0
    adjustments: Adjustments = field(default_factory=Adjustments)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens {self.max_tokens}: at least 1 is needed")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature {self.temperature}: must be from 0 to 2")
        NearDuplicateGate(self.window, self.stop_below)

    def request(self, entry: Entry) -> Request:
        """The request for one entry of a plan."""
        request = write_request(
            self.prompts[entry.kind],
            entry.fields,
            model=self.model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        return self.adjustments.apply(request)


def estimate(
    plan: Path,
    writing: Writing,
    price: Price,
    answered: Callable[[str], bool],
    count: Callable[[str], int] | None = None,
) -> Estimate:
    """Reckon what a plan can cost, and check every line of it.

    Args:
        plan: the plan file.
        writing: what is asked for.
        price: of the model.
        answered: whether a request, by its key, is in the ledger.
        count: tokens of a prompt; by default its bytes and room for a chat template, which is
            never less, and is what the ledger reserves.

    Raises:
        ValueError: the plan is empty or a line is no entry.
    """
    samples = done = prompt_tokens = completion_tokens = nano = 0
    for entry in read_plan(plan):
        request = writing.request(entry)
        samples += 1
        if answered(request.key):
            done += 1
            continue
        if count is None:
            prompt = request.prompt_bound
        else:
            prompt = sum(count(message["content"]) for message in request.messages)
        prompt_tokens += prompt
        completion_tokens += request.max_tokens
        nano += price.nano_dollars(prompt, request.max_tokens)
    if samples == 0:
        raise ValueError(f"{plan}: an empty plan")
    return Estimate(samples, done, prompt_tokens, completion_tokens, nano)


class Sifter:
    """Turns outcomes, in the order of the plan, into records and rejects."""

    def __init__(self, writing: Writing, plan: Path) -> None:
        self._writing = writing
        self._plan = plan
        self.gate = NearDuplicateGate(writing.window, writing.stop_below)

    def take(self, entry: Entry, outcome: Outcome) -> Record | Reject:
        """Judge one outcome; the near-duplicate gate remembers what is accepted."""
        try:
            record = self._record(entry, outcome)
        except DocumentError as error:
            self.gate.skip()
            return self._reject(entry, error.reason, error.detail)
        twin = self.gate.admit(record["text"], entry.id)
        if twin is not None:
            return self._reject(entry, "near_duplicate", f"repeats {twin}")
        return record

    def _reject(self, entry: Entry, reason: str, detail: str) -> Reject:
        return Reject(entry.id, reason, detail, f"{self._plan.name}:{entry.id}")

    def _record(self, entry: Entry, outcome: Outcome) -> Record:
        if isinstance(outcome, Failure):
            raise DocumentError("no_answer", outcome.detail)
        request = self._writing.request(entry)
        text = outcome.text
        if request.is_cut_off(outcome):
            raise DocumentError("truncated", f"cut off at {outcome.completion_tokens} tokens")
        if text is None:
            raise DocumentError(outcome.flaw, "the answer cannot be used")
        extra: dict[str, Json] = {}
        if entry.kind == "exercise":
            exercise = check_exercise(text, entry.fields["name"])
            text = exercise.text
            extra = {"problem": exercise.problem, "solution": exercise.solution}
        else:
            text = check_textbook(text, self._writing.min_words)
        gen: dict[str, Json] = {
            "request": request.key,
            "model": self._writing.model,
            "served_model": outcome.served_model,
            "prompt": digest(self._writing.prompts[entry.kind])[:12],
            "plan": dict(entry.fields),
            "finish_reason": outcome.finish_reason,
            "usage": {"in": outcome.prompt_tokens, "out": outcome.completion_tokens},
        }
        record = Record(
            id=entry.id,
            text=text,
            source=entry.kind,
            lang="python" if entry.kind == "exercise" else "en",
        )
        # Later stages keep `gen`, `problem` and `solution` without knowing them.
        return cast(Record, {**record, **extra, "gen": gen})


@dataclass(frozen=True)
class Generated:
    """What `generate` did.

    Attributes:
        manifest: of the records.
        reused: whether they were there already.
        report: the content of `report.json`.
    """

    manifest: Manifest
    reused: bool
    report: dict[str, Json]


def generate(
    plan: Path,
    out: Path,
    writing: Writing,
    server: Server,
    sending: Sending,
    ledger: Ledger,
    redact: Redactor,
    options: Options,
    *,
    samples: int,
    partial: bool = False,
) -> Generated:
    """Ask for what the ledger has not, then write the records.

    Args:
        plan: the plan file.
        out: records directory to make, with the growth curve and the costs in `report.json`.
        writing: what is asked for and accepted.
        server: who writes.
        sending: how fast.
        ledger: where answers are kept.
        redact: keeps keys out of messages.
        options: of the stage.
        samples: entries of the plan, for the progress line.
        partial: publish what there is when the cost cap ends the run.

    Raises:
        ValueError: `out` holds something else.
        RunError: the server is gone, the cap was reached, nothing was kept, or none of the first
            answers can be used (`Patience`).
        TooManyRejects: see `Options.max_reject`.
    """
    stage = _stage(writing)
    inputs = [{"path": str(plan), "files": 1, "sha256": file_sha256(plan), "complete": True}]
    finished = finished_output(stage, inputs, out, options.overwrite)
    if finished is not None:
        return Generated(finished, True, json.loads((out / REPORT_NAME).read_bytes()))
    failures: dict[str, Failure] = {}
    sifter = Sifter(writing, plan)
    progress = Progress("generate", samples)
    patience = Patience(
        "ask another --model, or in other words with --prompt",
        {"too_short": "lower --min-words or raise --max-tokens"},
    )
    under_way: dict[int, Entry] = {}

    def requests() -> Iterator[Request]:
        for number, entry in enumerate(read_plan(plan)):
            under_way[number] = entry
            yield writing.request(entry)

    def on_outcome(number: int, outcome: Outcome) -> bool:
        entry = under_way.pop(number)
        if isinstance(outcome, Failure):
            failures[entry.id] = outcome
        progress.done += 1
        made = sifter.take(entry, outcome)
        if isinstance(made, Reject):
            patience.take(made.reason, made.detail, ledger.path)
        else:
            patience.take(None, "", ledger.path)
            progress.accepted += 1
        return not sifter.gate.exhausted

    traffic, cap = asyncio.run(
        ask_server(server, sending, ledger, requests(), on_outcome, redact, progress)
    )
    if cap and not partial:
        raise RunError(
            f"{progress.done} of {samples} samples are written, then the cost cap ended the run: "
            f"{cap}; raise --max-cost and run again, or pass --partial to publish these"
        )
    inputs[0]["complete"] = not cap
    report: dict[str, Json] = {}

    def finish(directory: Path, notes: list[list[Json]]) -> None:
        """Say how the run went, beside the parts."""
        (written,) = notes[0]
        report.update(
            samples_planned=samples,
            stopped=cap or ("nothing new any more" if written["exhausted"] else ""),
            growth_curve=written["growth_curve"],
            traffic=traffic_report(traffic, ledger),
        )
        write_json(directory / REPORT_NAME, report)

    work = Work(
        shards=[_Shard(plan, writing, ledger, failures)],
        fingerprint=[inputs, len(ledger), sorted(failures)],
        describe=lambda recorded: inputs,
        identify=lambda: inputs,
        finish=finish,
    )
    manifest, reused = run_stage(stage, work, out, options)
    if reused:  # an output that had been set aside for its rejects
        report = json.loads((out / REPORT_NAME).read_bytes())
    return Generated(manifest, reused, report)


def _stage(writing: Writing) -> Stage:
    config = vars(writing) | {"prompts": dict(writing.prompts)}
    config |= config.pop("adjustments").config()
    return Stage(
        name="generate",
        version=VERSION,
        config=config,
        function=_run_shard,
        notes=("texts come from a language model",),
    )


@dataclass(frozen=True)
class _Shard:
    """The whole plan: the near-duplicate gate compares each sample with all before it."""

    plan: Path
    writing: Writing
    ledger: Ledger
    failures: dict[str, Failure]


def _run_shard(shard: _Shard, config: Json, tally: Tally) -> Iterator[Record | Reject]:
    sifter = Sifter(shard.writing, shard.plan)
    for entry in read_plan(shard.plan):
        if sifter.gate.exhausted:
            break
        outcome: Outcome | None = shard.ledger.answer(shard.writing.request(entry).key)
        outcome = outcome or shard.failures.get(entry.id)
        if outcome is not None:  # else the cap ended the run before this entry
            tally.records_in += 1
            yield sifter.take(entry, outcome)
    curve = [vars(window) for window in sifter.gate.curve]
    tally.notes.append({"growth_curve": curve, "exhausted": sifter.gate.exhausted})
