"""The heuristics stage: signals, the scan for secrets and personal data, and thresholds.

Each record gets `signals` (`signals.py`) and `secrets`, the kinds and counts of what the scan found
(`secrets.py`); the rules of a thresholds file (`heuristics.yaml`) then keep or reject it. Signals
and scans that a record carries already are used as they are, so that `signals_only`, once, and
then any number of runs with other thresholds cost no parsing.

Reasons besides the names of the rules: `unscannable` (the text killed the process that parsed it),
`secret` and `pii` (found, and to be rejected rather than redacted), `surrogate`. Details of
rejects hold numbers, kinds and counts, and never a piece of the text.
"""

import time
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml

from data_pipeline.heuristics.options import HeuristicsOptions, HeuristicsRun
from data_pipeline.heuristics.secrets import (
    PII_KINDS,
    SCANNER_VERSION,
    count_kinds,
    detect_secrets_version,
    redact,
    scan,
)
from data_pipeline.heuristics.signals import SIGNALS_VERSION, Signals, compute_signals
from data_pipeline.records.record import Json, Record, Reject, record_id
from data_pipeline.runner.disposable_worker import DisposableWorker, WorkerDied
from data_pipeline.runner.finished import Finished, Show, run_planned
from data_pipeline.runner.record_work import (
    PartShard,
    broken_text,
    config_of,
    read_shard,
    record_work,
)
from data_pipeline.runner.stage import Stage, Tally, Work

VERSION = "2"
# What identifies a record or a fixed vocabulary holds no secret and must not change.
_UNSCANNED_KEYS = {"id", "source", "lang", "license", "revision", "lineage", "signals", "secrets"}
_RULE_KEYS = {"signal", "min", "max", "python"}


def load_thresholds(path: Path | None) -> dict[str, Json]:
    """Read and check a thresholds file; None reads ours.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file; the rule is named.
    """
    name = "heuristics.yaml" if path is None else str(path)
    source = resources.files("data_pipeline.heuristics") / name if path is None else path
    if not source.is_file():
        raise FileNotFoundError(f"{name}: no such thresholds file")
    try:
        value = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict) or set(value) != {"rules", "text_sources"}:
        raise ValueError(f"{name}: must have the keys rules and text_sources, and no other")
    sources, rules = value["text_sources"], value["rules"] or {}
    if not isinstance(sources, list) or not all(isinstance(item, str) for item in sources):
        raise ValueError(f"{name}: text_sources: must be a list of source labels")
    if not isinstance(rules, dict):
        raise ValueError(f"{name}: rules: must be a mapping of names to rules")
    for rule_name, rule in rules.items():
        _check_rule(f"{name}: rules.{rule_name}", rule)
    # A list keeps the order, which decides the reason, where a mapping in a digest would not.
    return {"text_sources": sources, "rules": [{"name": str(n), **r} for n, r in rules.items()]}


def _check_rule(where: str, rule: Json) -> None:
    if not isinstance(rule, dict) or not set(rule) <= _RULE_KEYS or "signal" not in rule:
        raise ValueError(f"{where}: must be signal and min or max, and python if for Python alone")
    numeric = [k for k, kind in Signals.__annotations__.items() if kind is not str]
    if rule["signal"] not in numeric or rule["signal"] == "version":
        raise ValueError(f"{where}: no signal {rule['signal']!r}; there are {', '.join(numeric)}")
    limits = [rule[key] for key in ("min", "max") if key in rule]
    if not limits or any(isinstance(v, bool) or not isinstance(v, int | float) for v in limits):
        raise ValueError(f"{where}: needs min or max, a number")
    if not isinstance(rule.get("python", False), bool):
        raise ValueError(f"{where}: python must be true or false")


def heuristics(run: HeuristicsRun, show: Show) -> Finished:
    """Apply the heuristics to records.

    Raises:
        FileNotFoundError, ValueError, RunError: see `plan_heuristics` and `run_stage`.
    """
    started = time.monotonic()
    planned = plan_heuristics(run.records, run.options)
    libraries = ("detect-secrets",)
    return run_planned(planned, run.output, run.engine, show, libraries=libraries, started=started)


def plan_heuristics(records: Sequence[Path], options: HeuristicsOptions) -> tuple[Stage, Work]:
    """The stage and its work.

    Args:
        records: records directories.
        options: the stage's options.

    Raises:
        FileNotFoundError: a directory or the thresholds file is missing.
        ValueError: the thresholds are wrong, or detect-secrets is not installed.
        RunError: the records are damaged.
    """
    thresholds = load_thresholds(options.thresholds)
    if options.signals_only:
        thresholds["rules"] = []
    scanning = (options.secrets, options.pii) != ("keep", "keep")
    scanner: list[Json] = [SCANNER_VERSION]
    if scanning and options.detect_secrets:
        scanner.append(detect_secrets_version())
    config = config_of(options) | {
        "thresholds": thresholds,
        "scanner": scanner if scanning else None,
        "signals": SIGNALS_VERSION,
    }
    work = record_work(records)
    return Stage(name="heuristics", version=VERSION, config=config, function=heuristics_shard), work


def heuristics_shard(
    shard: PartShard, config: dict[str, Any], tally: Tally
) -> Iterator[Record | Reject]:
    """The stage function: yield the record with its signals, or the reject, of each document."""
    with DisposableWorker("data_pipeline.heuristics.stage:examine") as worker:
        for where, record in read_shard(shard, tally):
            yield broken_text(where, record) or _outcome(where, record, config, worker)


def _outcome(
    where: str, record: Record, config: dict[str, Any], worker: DisposableWorker
) -> Record | Reject:
    fields, name = cast(dict[str, Any], record), record["id"]
    if not _is_examined(fields, config):
        request = {
            "record": {key: value for key, value in fields.items() if key != "lineage"},
            **{key: config[key] for key in ("scanner", "secrets", "pii")},
        }
        try:
            found_here = worker.call(request)
        except WorkerDied as error:
            return Reject(
                record["id"], "unscannable", f"the parser did not survive: {error}", where
            )
        fields.update(found_here)
        if "text" in found_here:  # redacted: another text has another id
            name = record_id(record["id"], record["text"])
    found = fields["secrets"]["found"]
    for reason, is_pii in (("secret", False), ("pii", True)):
        kinds = {kind: n for kind, n in found.items() if (kind in PII_KINDS) == is_pii}
        treatment = config["pii" if is_pii else "secrets"]
        if kinds and treatment == "reject":
            detail = ", ".join(f"{kind} {count}" for kind, count in kinds.items())
            return Reject(record["id"], reason, detail, where)
    failed = failed_rules(record, fields["signals"], config["thresholds"])
    if failed:
        return Reject(record["id"], failed[0][0], "; ".join(text for _, text in failed), where)
    record["id"] = name
    return record


def _is_examined(fields: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a record carries signals of this version, and a scan as this one would be."""
    signals, secrets = fields.get("signals"), fields.get("secrets")
    return (
        isinstance(signals, dict)
        and signals.get("version") == SIGNALS_VERSION
        and isinstance(secrets, dict)
        and secrets.get("scanner") == config["scanner"]
        and all(secrets.get(name) == _redacts(config, name) for name in ("secrets", "pii"))
    )


def _redacts(config: dict[str, Any], name: str) -> str:
    """What a scan did to the text: it matters to a later one only whether it redacted."""
    return "redacted" if config[name] == "redact" else "left"


def examine(request: dict[str, Any]) -> dict[str, Any]:
    """Signals and scan of one record; runs in a `DisposableWorker`.

    Args:
        request: `record`, and `scanner`, `secrets`, `pii` of the stage's configuration.

    Returns:
        The record's new fields: `signals`, of the text as it came, `secrets`, and every field in
        which something was redacted.
    """
    record = request["record"]
    result: dict[str, Any] = {"signals": compute_signals(record["text"])}
    redacted_kinds = {name: request[name] == "redact" for name in ("secrets", "pii")}
    counts: dict[str, int] = {}

    def clean(text: str) -> str:
        findings = scan(text, detect_secrets=len(request["scanner"]) > 1)
        for kind, count in count_kinds(findings).items():
            counts[kind] = counts.get(kind, 0) + count
        chosen = [
            f for f in findings if redacted_kinds["pii" if f.kind in PII_KINDS else "secrets"]
        ]
        return redact(text, chosen) if chosen else text

    if request["scanner"] is not None:
        for key, value in record.items():
            if key not in _UNSCANNED_KEYS:
                cleaned = _map_strings(value, clean)
                if cleaned != value:
                    result[key] = cleaned
    result["secrets"] = {
        "scanner": request["scanner"],
        "secrets": _redacts(request, "secrets"),
        "pii": _redacts(request, "pii"),
        "found": dict(sorted(counts.items())),
    }
    return result


def _map_strings(value: Json, function: Any) -> Json:
    """A JSON value with a function applied to each string in it, keys of objects excepted."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_map_strings(item, function) for item in value]
    if isinstance(value, dict):
        return {key: _map_strings(item, function) for key, item in value.items()}
    return value


def failed_rules(
    record: Record, signals: Signals, thresholds: dict[str, Json]
) -> list[tuple[str, str]]:
    """The rules that a record fails, in order, as (name, what was seen).

    Args:
        record: for its `lang` and `source`.
        signals: its signals.
        thresholds: see `load_thresholds`.
    """
    python = record.get("lang", "Python").lower() == "python"
    python = python and record["source"] not in thresholds["text_sources"]
    failed = []
    for rule in thresholds["rules"]:
        value = cast(dict[str, Any], signals)[rule["signal"]]
        if value is None or (rule.get("python", False) and not python):
            continue
        for limit, fails in (
            ("min", value < rule.get("min", value)),
            ("max", value > rule.get("max", value)),
        ):
            if fails:
                name = "below" if limit == "min" else "above"
                failed.append((rule["name"], f"{rule['signal']} {value} {name} {rule[limit]}"))
    return failed
