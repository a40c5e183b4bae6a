"""Before a language model is asked: servers with their keys and prices, ledger, and consent."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.llm.ledger import Ledger
from data_pipeline.llm.options import Asking, Money
from data_pipeline.llm.prices import Price, dollars, read_prices
from data_pipeline.llm.secrets import read_key
from data_pipeline.llm.session import Estimate, Server
from data_pipeline.llm.transport import OPENAI_HOST, parse_base_url
from data_pipeline.records.record import Json
from data_pipeline.runner.finished import Finished
from data_pipeline.runner.options import RecordsOutput
from data_pipeline.runner.output import Manifest
from data_pipeline.runner.stage import Options
from megaphi.errors import RunError

OPENAI_VARIABLE, OTHER_VARIABLE = "OPENAI_API_KEY", "MEGAPHI_API_KEY"


def read_servers(asking: Asking) -> list[Server]:
    """The servers, one for each model.

    Raises:
        ValueError, FileNotFoundError: a base URL, key or price cannot be used.
    """
    options = asking.server
    bases = [parse_base_url(url) for url in options.base_url]
    own_key = options.api_key_env or options.api_key_file
    if len({base.host for base in bases}) > 1 and own_key:
        raise ValueError("`base_url`: one key would be sent to two hosts; annotate in two runs")
    servers = []
    for model, base in zip(options.model, bases * (len(options.model) // len(bases)), strict=True):
        variable = options.api_key_env or (
            OPENAI_VARIABLE if base.host == OPENAI_HOST else OTHER_VARIABLE
        )
        key = read_key(variable, options.api_key_file)
        if key is None and (options.api_key_env or not base.loopback):
            raise ValueError(
                f"no API key for {base.host}: set {variable}, or give `api_key_env` or "
                "`api_key_file`"
            )
        price = _price(asking.money, model, base.loopback)
        if asking.sending.batch_api.is_used:
            price = price.in_batches()
        servers.append(Server(base=base, model=model, key=key, price=price))
    return servers


def _price(money: Money, model: str, loopback: bool) -> Price:
    """The price of a model; a server on this machine is free unless told otherwise."""
    if money.prices is not None:
        prices = read_prices(money.prices)
        if model not in prices:
            raise ValueError(f"{money.prices}: has no price of {model}")
        return prices[model]
    if money.price_in is not None and money.price_out is not None:
        return Price(money.price_in, money.price_out)
    if not loopback:
        raise ValueError(
            f"what does {model} cost? give `price_in` and `price_out` (dollars per million "
            "tokens), or a file of `prices`"
        )
    return Price(0, 0)


def asking_options(output: RecordsOutput) -> Options:
    """How `run_stage` is to run a stage that asks a language model."""
    return Options(
        max_reject=output.max_reject,
        overwrite=output.overwrite,
        libraries=("openai", "httpx2", "numpy"),
    )


@contextmanager
def open_ledger(asking: Asking, servers: Sequence[Server], out: Path) -> Iterator[Ledger]:
    """The ledger of an output, with the cost cap; closed at the end.

    Raises:
        ValueError: there is no cap, and the server is elsewhere.
        RunError: the ledger is in use or damaged, or holds batches that this run would not collect.
    """
    money = asking.money
    cap = money.max_cost
    elsewhere = [server.base.host for server in servers if not server.base.loopback]
    if cap is None and elsewhere and not money.estimate:
        raise ValueError(
            f"{elsewhere[0]}: is asked only with a `max_cost`, the most that may be spent in "
            "dollars; `estimate` tells what it can cost"
        )
    path = money.ledger or out.with_name(out.name + ".ledger.jsonl")
    ledger = Ledger(path, None if cap is None else int(cap * 1e9))
    try:
        if money.abandon_batches:
            count = ledger.abandon_batches()
            print(f"{path}: {count} requests in batches are given up", file=sys.stderr)
        _check_batches(asking, servers, ledger)
        yield ledger
    finally:
        ledger.close()


def _check_batches(asking: Asking, servers: Sequence[Server], ledger: Ledger) -> None:
    """Check that batches under way belong to this run: else they would be paid and not used.

    Raises:
        RunError: one does not.
    """
    mine = {(server.base.url, server.model) for server in servers}
    for batch in ledger.batches.values():
        if asking.sending.batch_api.is_used and (batch.server, batch.model) in mine:
            continue
        raise RunError(
            f"{ledger.path}: a batch of {len(batch.members)} requests to {batch.model} at "
            f"{batch.server} is under way; collect it with `backend` batch and that `model` and "
            "`base_url`, or give it up with `abandon_batches`"
        )


def consent(
    money: Money, found: Estimate, ledger: Ledger, ask: Callable[[str], str] = input
) -> Finished | None:
    """Say what a run can cost, and ask before anything is spent.

    Returns:
        The outcome where only an estimate is wanted, else None to go on.

    Raises:
        ValueError: the user does not agree, or cannot be asked.
    """
    text = (
        f"{found.samples} requests, {found.answered} of them answered and paid already; the others "
        f"take at most {found.prompt_tokens} prompt and {found.completion_tokens} completion "
        f"tokens, at most {dollars(found.nano)}; spent so far {dollars(ledger.spent)}"
    )
    if money.estimate:
        result = vars(found) | {"dollars": found.nano / 1e9, "spent_dollars": ledger.spent / 1e9}
        return Finished({"verb": "estimate", **result}, text)
    print(text, file=sys.stderr, flush=True)
    if found.nano == 0 or money.yes:
        return None
    if not sys.stdin.isatty():
        raise ValueError(f"this can cost {dollars(found.nano)}: pass `yes` to agree")
    if ask("Continue? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was asked, nothing was spent")
    return None


def asked_result(
    out: Path, manifest: Manifest, reused: bool, ledger: Ledger, started: float
) -> dict[str, Json]:
    """What the results of all stages that ask have in common.

    Args:
        out: records directory.
        manifest: of it.
        reused: it was there already.
        ledger: where the answers are.
        started: `time.monotonic()` at the start.
    """
    return {
        "out": str(out),
        "ledger": str(ledger.path),
        "reused": reused,
        "records_in": manifest.records_in,
        "records_out": manifest.records_out,
        "rejected": manifest.rejected,
        "records_sha256": manifest.records_sha256,
        "dollars": ledger.spent / 1e9,
        "seconds": round(time.monotonic() - started, 3),
    }


def unanswered(rejected: dict[str, int]) -> str:
    """What to do about requests that the server failed to answer; "" when there are none."""
    count = rejected.get("no_answer", 0)
    return f" | {count} without an answer: `overwrite` asks for them again" if count else ""
