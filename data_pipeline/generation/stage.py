"""Writes textbook sections and exercises: a plan in, records out.

All answers go through the ledger first. The records are then made from plan and ledger alone, in
the order of the plan, so that they are the same however often the run was killed and in whatever
order the server answered. Each sample that was asked for is kept, or rejected with a reason.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from data_pipeline.generation.check import check_exercise, check_textbook
from data_pipeline.generation.near_duplicates import NearDuplicateGate
from data_pipeline.generation.options import GenerateRun, WritingOptions
from data_pipeline.generation.plan import Entry, read_plan
from data_pipeline.llm.account import (
    asked_result,
    asking_options,
    consent,
    open_ledger,
    read_servers,
    unanswered,
)
from data_pipeline.llm.ask import Failure, Outcome
from data_pipeline.llm.completion import Request
from data_pipeline.llm.ledger import Ledger
from data_pipeline.llm.options import Sending
from data_pipeline.llm.parameters import Adjustments, read_adjustments
from data_pipeline.llm.patience import Patience
from data_pipeline.llm.prices import Price, dollars
from data_pipeline.llm.prompts import DEFAULT_PROMPTS, check_template, write_request
from data_pipeline.llm.secrets import Redactor, guarded
from data_pipeline.llm.session import (
    REPORT_NAME,
    Estimate,
    Progress,
    Server,
    ask_server,
    traffic_report,
)
from data_pipeline.records.record import Json, Record, Reject, digest, record_id
from data_pipeline.records.text import DocumentError
from data_pipeline.runner.finished import Finished, Show, reasons
from data_pipeline.runner.output import (
    Manifest,
    write_json,
)
from data_pipeline.runner.stage import Options, Stage, Tally, Work, finished_output, run_stage
from megaphi.durable import file_sha256
from megaphi.errors import RunError

VERSION = "2"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """Who writes, with which template of each kind, and what is accepted."""

    model: str
    prompts: dict[str, str]
    options: WritingOptions
    adjustments: Adjustments

    def request(self, entry: Entry) -> Request:
        """The request for one entry of a plan."""
        request = write_request(
            self.prompts[entry.kind],
            entry.fields,
            model=self.model,
            max_tokens=self.options.max_tokens,
            temperature=self.options.temperature,
            seed=self.options.seed,
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
        self.gate = NearDuplicateGate(writing.options.window, writing.options.stop_below)

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
            text = check_textbook(text, self._writing.options.min_words)
        gen: dict[str, Json] = {
            "request": request.key,
            "model": self._writing.model,
            "served_model": outcome.served_model,
            "prompt": digest(self._writing.prompts[entry.kind])[:12],
            "entry": entry.id,
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
        record["id"] = record_id(entry.id, text)  # another model writes another text of this plan
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


def generate_run(run: GenerateRun, show: Show) -> Finished:
    """Generate as the user's options say, once the user agrees to the cost; see `generate`."""
    started, out = time.monotonic(), run.output.out
    (server,) = read_servers(run.asking)
    writing = Writing(
        model=server.model,
        prompts=_prompts(run),
        options=run.options,
        adjustments=read_adjustments(run.asking.parameters),
    )
    redact = Redactor([server.key] if server.key is not None else [])
    with guarded(redact), open_ledger(run.asking, [server], out) as ledger:
        count = _counter(run.tokenizer)
        found = estimate(run.plan, writing, server.price, ledger.__contains__, count)
        estimate_only = consent(run.asking.money, found, ledger)
        if estimate_only is not None:
            return estimate_only
        made = generate(
            run.plan,
            out,
            writing,
            server,
            run.asking.sending,
            ledger,
            redact,
            asking_options(run.output),
            samples=found.samples,
            partial=run.partial,
        )
        result = asked_result(out, made.manifest, made.reused, ledger, started)
    manifest, report = made.manifest, made.report
    result |= {"stopped": report["stopped"], "growth_curve": report["growth_curve"]}
    stopped = f" | stopped: {report['stopped']}" if report["stopped"] else ""
    line = (
        f"{'reused' if made.reused else 'generated'} {out}: {manifest.records_out} "
        f"records of {manifest.records_in} asked for | {reasons(manifest.rejected)}{stopped} | "
        f"{dollars(ledger.spent)} in all | {time.monotonic() - started:.1f} s"
        f"{unanswered(manifest.rejected)}"
    )
    return Finished(result, line)


def _prompts(run: GenerateRun) -> dict[str, str]:
    """The template of each kind.

    Raises:
        ValueError, FileNotFoundError: the user's cannot be used.
    """
    prompts = dict(DEFAULT_PROMPTS)
    if run.prompt is not None:
        if not run.prompt.is_file():
            raise FileNotFoundError(f"`prompt` {run.prompt}: no such file")
        template = run.prompt.read_text(encoding="utf-8")
        first = next(read_plan(run.plan), None)
        if first is None:
            raise ValueError(f"{run.plan}: an empty plan")
        check_template(template, first.fields, str(run.prompt))
        prompts[first.kind] = template
    return prompts


def _counter(name: str | None) -> Callable[[str], int] | None:
    """Counts tokens with a tokenizer; None for the default."""
    if name is None:
        return None
    from data_pipeline.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name)
    return lambda text: len(tokenizer.encode_batch([text])[0])


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
        "ask another `model`, or in other words with `prompt`",
        {"too_short": "lower `min_words` or raise `max_tokens`"},
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
            f"{cap}; raise `max_cost` and run again, or set `partial` to publish these"
        )
    inputs[0]["complete"] = not cap
    report: dict[str, Json] = {}

    def finish(directory: Path, notes: list[list[Json]]) -> None:
        """Report how the run went, next to the parts."""
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
    config = {"model": writing.model, "prompts": writing.prompts, **vars(writing.options)}
    config |= writing.adjustments.config()
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
