"""Asks a language model how educational documents are: phi-1's labels for its quality filter.

A stratified sample is judged by one or more annotators, with canaries (documents whose score is
known) in every batch. The output holds the sampled records with their scores in `quality`; a
document without any usable score is rejected. `report.json` alongside them says how far the
annotators can be trusted: canaries, agreement, and labels that the text alone makes unlikely.
"""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from data_pipeline.annotation.canaries import GOOD_FROM, Canary, canaries
from data_pipeline.annotation.options import AnnotateRun, JudgingOptions
from data_pipeline.annotation.report import Annotator, annotation_report
from data_pipeline.annotation.sample import choose, read_records, stratum
from data_pipeline.llm.account import (
    asked_result,
    asking_options,
    consent,
    open_ledger,
    read_servers,
    unanswered,
)
from data_pipeline.llm.ask import Failure, Outcome, Traffic
from data_pipeline.llm.completion import Request
from data_pipeline.llm.ledger import Ledger
from data_pipeline.llm.options import Sending
from data_pipeline.llm.parameters import Adjustments, read_adjustments
from data_pipeline.llm.patience import Patience
from data_pipeline.llm.prices import dollars
from data_pipeline.llm.prompts import QUESTION, judge_request, read_score
from data_pipeline.llm.secrets import Redactor, guarded
from data_pipeline.llm.session import (
    REPORT_NAME,
    Estimate,
    Progress,
    Server,
    ask_server,
    traffic_report,
)
from data_pipeline.records.record import Json, Record, Reject, digest
from data_pipeline.runner.finished import Finished, Show
from data_pipeline.runner.output import Manifest, read_manifest, write_json
from data_pipeline.runner.stage import Options, Stage, Tally, Work, finished_output, run_stage
from megaphi.errors import RunError

VERSION = "2"


@dataclass(frozen=True)
class Judging:
    """The annotators, by model name, and what they are asked."""

    models: tuple[str, ...]
    options: JudgingOptions
    adjustments: Adjustments

    @property
    def question(self) -> str:
        """What to determine."""
        return self.options.question or QUESTION

    def request(self, text: str, model: str, salt: str) -> Request:
        """The request to judge one text; its beginning where it is long."""
        request = judge_request(
            text[: self.options.max_chars],
            model=model,
            question=self.question,
            answers=self.options.answers,
            salt=salt,
            seed=self.options.seed,
        )
        return self.adjustments.apply(request)


@dataclass(frozen=True)
class _Question:
    """A request, and whom it is about: a record id, or a canary of a batch."""

    request: Request
    record: str | None
    canary: tuple[int, Canary] | None


class Annotation:
    """A sample of records and the questions about it.

    Args:
        directories: records directories.
        judging: what is judged.

    Raises:
        FileNotFoundError, ValueError, RunError: see `choose`.
    """

    def __init__(self, directories: Sequence[Path], judging: Judging) -> None:
        self.directories = directories
        self.judging = judging
        self.chosen, self.strata = choose(
            directories, judging.options.samples, judging.options.seed
        )

    def records(self) -> Iterator[tuple[str, Record]]:
        """Yield (position, record) of the sample; a record that is in two places once."""
        left = set(self.chosen)
        for where, record in read_records(self.directories):
            if record["id"] in left:
                left.remove(record["id"])
                yield where, record

    def questions(self, model: str) -> Iterator[_Question]:
        """What to ask an annotator, in order: before each batch of documents its canaries."""
        for number, (_, record) in enumerate(self.records()):
            batch, place = divmod(number, self.judging.options.batch_documents)
            if place == 0:
                for canary in canaries(batch):
                    # The batch is in the salt, so that canaries are asked, not remembered.
                    salt = f"{self.judging.options.seed}/canary/{batch}"
                    request = self.judging.request(canary.text, model, salt)
                    yield _Question(request, None, (batch, canary))
            salt = f"{self.judging.options.seed}/{record['id']}"
            yield _Question(self.judging.request(record["text"], model, salt), record["id"], None)

    def estimate(self, servers: Sequence[Server], ledger: Ledger) -> Estimate:
        """What the questions can cost at most."""
        samples = done = prompt_tokens = completion_tokens = nano = 0
        for server in servers:
            for question in self.questions(server.model):
                request = question.request
                samples += 1
                if request.key in ledger:
                    done += 1
                    continue
                prompt_tokens += request.prompt_bound
                completion_tokens += request.max_tokens
                nano += server.price.nano_dollars(request.prompt_bound, request.max_tokens)
        return Estimate(samples, done, prompt_tokens, completion_tokens, nano)


@dataclass(frozen=True)
class Annotated:
    """What `annotate` did: manifest, whether it was there already, content of `report.json`."""

    manifest: Manifest
    reused: bool
    report: dict[str, Json]


def annotate_run(run: AnnotateRun, show: Show) -> Finished:
    """Annotate as the user's options say, once the user agrees to the cost; see `annotate`."""
    started, out = time.monotonic(), run.output.out
    servers = read_servers(run.asking)
    redact = Redactor([server.key for server in servers if server.key is not None])
    judging = Judging(run.asking.server.model, run.options, read_adjustments(run.asking.parameters))
    with guarded(redact):
        annotation = Annotation(run.records, judging)
        with open_ledger(run.asking, servers, out) as ledger:
            estimate_only = consent(run.asking.money, annotation.estimate(servers, ledger), ledger)
            if estimate_only is not None:
                return estimate_only
            made = annotate(
                annotation,
                out,
                servers,
                run.asking.sending,
                ledger,
                redact,
                asking_options(run.output),
            )
            result = asked_result(out, made.manifest, made.reused, ledger, started)
    report, manifest = made.report, made.manifest
    result |= {"annotators": report["annotators"], "agreement": report["agreement"]}
    trust = ", ".join(
        f"{each['model']} {each['canaries_right']:.0%} of {each['canaries']} canaries right"
        for each in report["annotators"]
    )
    for pair in report["agreement"]:
        kappa = pair["weighted_kappa"]
        trust += f", weighted kappa {'n/a' if kappa is None else format(kappa, '.2f')}"
    audit = report["text_classifier"]
    flagged = "" if audit is None else f", {len(audit['flagged'])} flagged"
    line = (
        f"{'reused' if made.reused else 'annotated'} {out}: {manifest.records_out} "
        f"records, {manifest.num_rejected} rejected | {trust}{flagged} | "
        f"{dollars(ledger.spent)} in all | {time.monotonic() - started:.1f} s"
        f"{unanswered(manifest.rejected)}"
    )
    return Finished(result, line)


def annotate(
    annotation: Annotation,
    out: Path,
    servers: Sequence[Server],
    sending: Sending,
    ledger: Ledger,
    redact: Redactor,
    options: Options,
) -> Annotated:
    """Ask for what the ledger has not, then write the labelled records.

    Args:
        annotation: the sample.
        out: records directory to make.
        servers: one for each annotator.
        sending: how fast.
        ledger: where answers are kept.
        redact: keeps keys out of messages.
        options: of the stage.

    Raises:
        ValueError: `out` holds something else.
        RunError: the server is gone, the cap was reached, or an annotator failed its canaries.
        TooManyRejects: see `Options.max_reject`.
    """
    judging = annotation.judging
    stage = Stage(name="annotate", version=VERSION, config=_config(judging), function=_run_shard)
    inputs = _inputs(annotation.directories)
    finished = finished_output(stage, inputs, out, options.overwrite)
    if finished is not None:
        return Annotated(finished, True, json.loads((out / REPORT_NAME).read_bytes()))
    annotators, traffic = asyncio.run(_ask(annotation, servers, sending, ledger, redact))
    report = annotation_report(
        (record for _, record in annotation.records()), annotation.strata, annotators
    )
    report["traffic"] = [traffic_report(each, ledger) for each in traffic]
    flagged = set(report["text_classifier"]["flagged"]) if report["text_classifier"] else set()
    work = Work(
        shards=[_Shard(annotation, annotators, flagged)],
        fingerprint=[inputs, len(ledger), digest([vars(a)["unscored"] for a in annotators])],
        describe=lambda recorded: inputs,
        identify=lambda: inputs,
        finish=lambda directory, notes: write_json(directory / REPORT_NAME, report),
    )
    manifest, _ = run_stage(stage, work, out, options)
    return Annotated(manifest, False, report)


def _config(judging: Judging) -> dict[str, Json]:
    """The options; with a hash of the prompt, whose wording is code."""
    sample, options = judging.request("", judging.models[0], ""), judging.options
    config: dict[str, Json] = {
        "models": list(judging.models),
        "samples": options.samples,
        "seed": options.seed,
        "question": judging.question,
        "answers": options.answers,
        "max_chars": options.max_chars,
        "batch": options.batch_documents,
        "min_canaries": options.min_canaries,
        "prompt": _prompt_hash(sample),
    }
    return config | judging.adjustments.config()


def _prompt_hash(request: Request) -> str:
    return digest([request.messages, request.parameters])[:12]


def _inputs(directories: Sequence[Path]) -> list[dict[str, Json]]:
    manifests = [(directory, read_manifest(directory)) for directory in directories]
    return [
        {
            "path": str(directory),
            "files": len(manifest.parts),
            "bytes": sum(part.bytes for part in manifest.parts),
            "sha256": manifest.records_sha256,
        }
        for directory, manifest in manifests
    ]


async def _ask(
    annotation: Annotation,
    servers: Sequence[Server],
    sending: Sending,
    ledger: Ledger,
    redact: Redactor,
) -> tuple[list[Annotator], list[Traffic]]:
    """Put all questions to all annotators, one after the other.

    Raises:
        RunError: see `ask_server`; the cost cap ended the run, or an annotator failed its canaries,
            of which it is told before all is paid (`Annotator.is_hopeless`).
    """
    enough = annotation.judging.options.min_canaries
    annotators, traffics = [], []
    for server in servers:
        annotator = Annotator(server.model)
        patience = Patience(
            "ask another `model`, try `answers` text, or give thoughts room with "
            "`reasoning_tokens`",
            {},
        )
        under_way: dict[int, _Question] = {}
        total = len(annotation.chosen)
        batches = -(-total // annotation.judging.options.batch_documents)
        progress = Progress(f"annotate {server.model}", total + 2 * batches)

        def requests(
            model: str = server.model, under_way: dict[int, _Question] = under_way
        ) -> Iterator[Request]:
            for number, question in enumerate(annotation.questions(model)):
                under_way[number] = question
                yield question.request

        def on_outcome(
            number: int,
            outcome: Outcome,
            annotator: Annotator = annotator,
            under_way: dict[int, _Question] = under_way,
            progress: Progress = progress,
            patience: Patience = patience,
        ) -> bool:
            progress.done += 1
            question = under_way.pop(number)
            unusable = _take(question, outcome, annotator, annotation.judging.options.answers)
            reason, seen = unusable or (None, "")
            patience.take(reason, seen, ledger.path)
            progress.accepted += unusable is None
            return question.canary is None or not annotator.is_hopeless(enough)

        traffic, cap = await ask_server(
            server, sending, ledger, requests(), on_outcome, redact, progress
        )
        if cap:
            raise RunError(
                f"{server.model}: {progress.done} of {progress.total} documents and canaries are "
                f"judged, then the cost cap ended the run: {cap}; raise `max_cost` and run again"
            )
        if annotator.canary_share < enough:
            raise RunError(
                f"{server.model}: judged {annotator.canary_share:.0%} of "
                f"{len(annotator.canaries)} canaries rightly, below `min_canaries` {enough:g}, in "
                f"{progress.done} of {progress.total} requests: it cannot do this task; ask "
                f"another `model`, or lower `min_canaries`; the answers are kept in {ledger.path}"
            )
        annotators.append(annotator)
        traffics.append(traffic)
    return annotators, traffics


def _take(
    question: _Question, outcome: Outcome, annotator: Annotator, answers: str
) -> tuple[str, str] | None:
    """Note an outcome; returns None when it is a score, else why not, and what was seen."""
    score, reason, seen = None, "not_a_score", ""
    if isinstance(outcome, Failure):
        reason, seen = "no_answer", outcome.detail
    elif (text := outcome.text) is not None:
        score, seen = read_score(text, answers), repr(text[:40])
    else:
        reason = "truncated" if question.request.is_cut_off(outcome) else outcome.flaw
        seen = f"{outcome.completion_tokens} tokens"
    if question.canary is not None:
        annotator.canaries.append((*question.canary, score))
    else:
        assert question.record is not None
        if score is None:
            annotator.unscored[question.record] = reason
        else:
            annotator.scores[question.record] = score
    return None if score is not None else (reason, seen)


@dataclass(frozen=True)
class _Shard:
    annotation: Annotation
    annotators: list[Annotator]
    flagged: set[str]


def _run_shard(shard: _Shard, config: Json, tally: Tally) -> Iterator[Record | Reject]:
    judging = shard.annotation.judging
    for where, record in shard.annotation.records():
        tally.records_in += 1
        name = record["id"]
        given: list[dict[str, Json]] = [
            {
                "annotator": f"{annotator.model}@{config['prompt']}",
                "model": annotator.model,
                "score": annotator.scores[name],
                "request": judging.request(
                    record["text"], annotator.model, f"{judging.options.seed}/{name}"
                ).key,
            }
            for annotator in shard.annotators
            if name in annotator.scores
        ]
        if not given:
            reason = shard.annotators[0].unscored[name]
            yield Reject(name, reason, "no annotator gave a score", where)
            continue
        mean = sum(entry["score"] for entry in given) / len(given)
        quality = {
            "score": mean,
            "label": int(mean >= GOOD_FROM),
            "prompt": config["prompt"],
            "annotations": given,
            "stratum": stratum(record),
            "flagged": name in shard.flagged,
        }
        yield cast(Record, {**record, "quality": quality})
