"""Options and questions that `megaphi data annotate` and `megaphi data generate` share."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.llm.batch.run import Batching
    from data_pipeline.llm.ledger import Ledger
    from data_pipeline.llm.parameters import Adjustments
    from data_pipeline.llm.prices import Price
    from data_pipeline.llm.session import Estimate, Sending, Server
    from data_pipeline.runner.output import Manifest
    from data_pipeline.runner.stage import Options

OPENAI_VARIABLE, OTHER_VARIABLE = "OPENAI_API_KEY", "MEGAPHI_API_KEY"


def add_server(parser: argparse.ArgumentParser) -> None:
    """Options that say where the server is, what it costs and how fast to ask."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--model", required=True, action="append", metavar="NAME", help="as the server calls it"
    )
    group.add_argument(
        "--base-url", required=True, action="append", metavar="URL", help="such as .../v1"
    )
    group.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the API key (default: OPENAI_API_KEY for api.openai.com, "
        "MEGAPHI_API_KEY for any other server)",
    )
    group.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="file of mode 0600 with the API key"
    )
    _add_parameters(parser)
    money = parser.add_argument_group("money")
    money.add_argument("--price-in", type=float, metavar="USD", help="a million prompt tokens")
    money.add_argument("--price-out", type=float, metavar="USD", help="a million completion tokens")
    money.add_argument(
        "--prices",
        type=Path,
        metavar="FILE",
        help="YAML: MODEL: {input: USD, output: USD, batch: FACTOR}; the factor is the Batch API's",
    )
    money.add_argument(
        "--max-cost",
        type=float,
        metavar="USD",
        help="hard cap on all that the ledger records; a server that is not this machine needs one",
    )
    money.add_argument("--yes", action="store_true", help="spend without asking")
    money.add_argument(
        "--estimate", action="store_true", help="say what it can cost at most, and stop"
    )
    money.add_argument(
        "--ledger", type=Path, metavar="FILE", help="answers paid for (default: OUT.ledger.jsonl)"
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument("--requests-per-minute", type=float, metavar="N")
    speed.add_argument("--tokens-per-minute", type=float, metavar="N")
    speed.add_argument("--in-flight", type=int, default=16, metavar="N", help="requests at a time")
    speed.add_argument(
        "--deadline", type=float, default=300.0, metavar="S", help="seconds for one answer"
    )
    speed.add_argument(
        "--attempts", type=int, default=6, metavar="N", help="how often a request is sent"
    )
    speed.add_argument(
        "--max-wait",
        type=float,
        default=60.0,
        metavar="S",
        help="longest wait before asking again, whatever the server says",
    )
    _add_batch(parser)


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    """Options for servers that refuse, rename or need a parameter of a request."""
    group = parser.add_argument_group("parameters of a request")
    group.add_argument(
        "--leave-out", action="append", default=[], metavar="NAME", help="such as temperature, seed"
    )
    group.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="such as max_tokens=max_completion_tokens",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="add a parameter, such as reasoning_effort=low; the value is JSON or a word",
    )
    group.add_argument(
        "--reasoning-tokens",
        type=int,
        default=0,
        metavar="N",
        help="room for the model's thoughts, above that for the answer; they are never kept",
    )
    group.add_argument(
        "--merge-system",
        action="store_true",
        help="put the system message in front of the user's, for models that take none",
    )


def adjustments(arguments: argparse.Namespace) -> "Adjustments":
    """What the command line changes in every request.

    Raises:
        ValueError: an option cannot be used.
    """
    from data_pipeline.llm.parameters import read_adjustments

    return read_adjustments(
        arguments.leave_out,
        arguments.rename,
        arguments.set,
        arguments.reasoning_tokens,
        arguments.merge_system,
    )


def _add_batch(parser: argparse.ArgumentParser) -> None:
    """Options of the Batch API."""
    group = parser.add_argument_group("Batch API")
    group.add_argument(
        "--backend",
        choices=("live", "batch"),
        default="live",
        help="live: one request at a time, answered at once; batch: files of requests, answered "
        "within a day for less",
    )
    group.add_argument(
        "--poll-interval", type=float, default=60.0, metavar="S", help="seconds between two looks"
    )
    group.add_argument("--batches", type=int, default=4, metavar="N", help="batches at a time")
    group.add_argument(
        "--batch-requests", type=int, default=50_000, metavar="N", help="requests of a batch"
    )
    group.add_argument(
        "--batch-rounds", type=int, default=4, metavar="N", help="batches that a request may see"
    )
    group.add_argument(
        "--batch-settle",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds after which a batch is in the server's list for certain",
    )
    group.add_argument(
        "--abandon-batches",
        action="store_true",
        help="give up what the ledger's batches have under way, and count it as paid",
    )


def need_llm() -> None:
    """Check that the packages of the extra `llm` are there.

    Raises:
        ValueError: they are not.
    """
    try:
        import httpx2  # noqa: F401
        import openai  # noqa: F401
    except ImportError:
        raise ValueError(
            "asking a language model needs openai 3 or newer: pip install 'megaphi[llm]'"
        ) from None


def read_servers(arguments: argparse.Namespace) -> "list[Server]":
    """The servers of the command line, one for each `--model`.

    Raises:
        ValueError, FileNotFoundError: a base URL, key or price cannot be used.
    """
    from data_pipeline.llm.secrets import read_key
    from data_pipeline.llm.session import Server
    from data_pipeline.llm.transport import OPENAI_HOST, parse_base_url

    models, urls = arguments.model, arguments.base_url
    if len(urls) not in (1, len(models)):
        raise ValueError("--base-url: give one for all models, or one for each in the same order")
    bases = [parse_base_url(url) for url in urls]
    if len({base.host for base in bases}) > 1 and (arguments.api_key_env or arguments.api_key_file):
        raise ValueError("--base-url: one key would be sent to two hosts; annotate in two runs")
    servers = []
    for model, base in zip(models, bases * (len(models) // len(bases)), strict=True):
        variable = arguments.api_key_env or (
            OPENAI_VARIABLE if base.host == OPENAI_HOST else OTHER_VARIABLE
        )
        key = read_key(variable, arguments.api_key_file)
        if key is None and (arguments.api_key_env or not base.loopback):
            raise ValueError(
                f"no API key for {base.host}: set {variable}, or pass --api-key-env or "
                "--api-key-file"
            )
        price = _price(arguments, model, base.loopback)
        if arguments.backend == "batch":
            price = price.in_batches()
        servers.append(Server(base=base, model=model, key=key, price=price))
    return servers


def _price(arguments: argparse.Namespace, model: str, loopback: bool) -> "Price":
    """The price of a model; a server on this machine is free unless told otherwise."""
    from data_pipeline.llm.prices import Price, read_prices

    if arguments.prices is not None:
        prices = read_prices(arguments.prices)
        if model not in prices:
            raise ValueError(f"{arguments.prices}: has no price of {model}")
        return prices[model]
    if (arguments.price_in is None) != (arguments.price_out is None):
        raise ValueError("--price-in and --price-out belong together")
    if arguments.price_in is not None:
        return Price(arguments.price_in, arguments.price_out)
    if not loopback:
        raise ValueError(
            f"what does {model} cost? pass --price-in and --price-out (dollars a million tokens), "
            "or --prices FILE"
        )
    return Price(0, 0)


def read_sending(arguments: argparse.Namespace) -> "Sending":
    """Speed and patience of the command line.

    Raises:
        ValueError: a value is out of range.
    """
    from data_pipeline.llm.ask import Policy
    from data_pipeline.llm.session import Sending

    return Sending(
        requests_per_minute=arguments.requests_per_minute,
        tokens_per_minute=arguments.tokens_per_minute,
        in_flight=arguments.in_flight,
        deadline=arguments.deadline,
        policy=Policy(attempts=arguments.attempts, max_wait=arguments.max_wait),
        batching=_read_batching(arguments) if arguments.backend == "batch" else None,
    )


def _read_batching(arguments: argparse.Namespace) -> "Batching":
    from data_pipeline.llm.batch.run import Batching

    return Batching(
        max_requests=arguments.batch_requests,
        batches=arguments.batches,
        rounds=arguments.batch_rounds,
        poll=arguments.poll_interval,
        settle=arguments.batch_settle,
    )


def stage_options(arguments: argparse.Namespace) -> "Options":
    """How the stage is run, as the command line says.

    Raises:
        ValueError: a value is out of range.
    """
    from data_pipeline.runner.stage import Options

    return Options(
        max_reject=arguments.max_reject,
        overwrite=arguments.overwrite,
        libraries=("openai", "httpx2", "numpy"),
    )


@contextmanager
def open_ledger(arguments: argparse.Namespace, servers: "list[Server]") -> "Iterator[Ledger]":
    """The ledger of the command line, with the cost cap; closed at the end.

    Raises:
        ValueError: the cap is not a sum of money, or missing where the server is elsewhere.
        RunError: the ledger is in use or damaged, or holds batches that this run would not collect.
    """
    from data_pipeline.llm.ledger import Ledger

    cap = arguments.max_cost
    if cap is not None and not 0 <= cap <= 1e9:
        raise ValueError(f"--max-cost {cap}: must be a sum in dollars, 0 or more")
    elsewhere = [server.base.host for server in servers if not server.base.loopback]
    if cap is None and elsewhere and not arguments.estimate:
        raise ValueError(
            f"{elsewhere[0]}: is asked only with --max-cost USD, the most that may be spent; "
            "--estimate says what it can cost"
        )
    out: Path = arguments.out
    path = arguments.ledger or out.with_name(out.name + ".ledger.jsonl")
    ledger = Ledger(path, None if cap is None else int(cap * 1e9))
    try:
        if arguments.abandon_batches:
            count = ledger.abandon_batches()
            print(f"{path}: {count} requests in batches are given up", file=sys.stderr)
        _check_batches(arguments, servers, ledger)
        yield ledger
    finally:
        ledger.close()


def _check_batches(
    arguments: argparse.Namespace, servers: "list[Server]", ledger: "Ledger"
) -> None:
    """Check that batches under way belong to this run: else they would be paid and not used.

    Raises:
        RunError: one does not.
    """
    from megaphi.errors import RunError

    mine = {(server.base.url, server.model) for server in servers}
    for batch in ledger.batches.values():
        if arguments.backend == "batch" and (batch.server, batch.model) in mine:
            continue
        raise RunError(
            f"{ledger.path}: a batch of {len(batch.members)} requests to {batch.model} at "
            f"{batch.server} is under way; collect it with --backend batch and that --model and "
            "--base-url, or give it up with --abandon-batches"
        )


def llm_result(
    arguments: argparse.Namespace,
    verb: str,
    manifest: "Manifest",
    reused: bool,
    spent: int,
    ledger: Path,
    started: float,
) -> dict[str, Any]:
    """What the JSON results of both verbs have in common.

    Args:
        arguments: of the verb.
        verb: its name.
        manifest: of the output.
        reused: it was there already.
        spent: all that the ledger records, in 1e-9 dollars.
        ledger: its file.
        started: `time.monotonic()` at the start.
    """
    return {
        "verb": verb,
        "out": str(arguments.out),
        "ledger": str(ledger),
        "reused": reused,
        "records_in": manifest.records_in,
        "records_out": manifest.records_out,
        "rejected": manifest.rejected,
        "records_sha256": manifest.records_sha256,
        "dollars": spent / 1e9,
        "seconds": round(time.monotonic() - started, 3),
    }


def consent(
    arguments: argparse.Namespace,
    found: "Estimate",
    ledger: "Ledger",
    ask: Callable[[str], str] = input,
) -> tuple[dict[str, Any], str] | None:
    """Say what a run can cost, and ask before anything is spent.

    Returns:
        The result of `--estimate`, else None to go on.

    Raises:
        ValueError: the user does not agree, or cannot be asked.
    """
    from data_pipeline.llm.prices import dollars

    text = (
        f"{found.samples} requests, {found.answered} of them answered and paid already; the others "
        f"take at most {found.prompt_tokens} prompt and {found.completion_tokens} completion "
        f"tokens, at most {dollars(found.nano)}; spent so far {dollars(ledger.spent)}"
    )
    if arguments.estimate:
        result = vars(found) | {"dollars": found.nano / 1e9, "spent_dollars": ledger.spent / 1e9}
        return {"verb": "estimate", **result}, text
    print(text, file=sys.stderr, flush=True)
    if found.nano == 0 or arguments.yes:
        return None
    if not sys.stdin.isatty():
        raise ValueError(f"this can cost {dollars(found.nano)}: pass --yes to agree")
    if ask("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("nothing was asked, nothing was spent")
    return None


def unanswered(rejected: dict[str, int]) -> str:
    """What to do about requests that the server failed to answer; "" when there are none."""
    count = rejected.get("no_answer", 0)
    return f" | {count} without an answer: --overwrite asks for them again" if count else ""
