"""`megaphi generate MODEL --prompt TEXT`: complete texts with a trained model.

A FILE.jsonl with {"prompt": …} on each line is completed in batches, and one JSON object is printed
for each completion, in the order of the file, with the other keys of its line. What is printed does
not depend on --batch-size, but for ties that rounding may tip.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.model_options import (
    add_generation_options,
    check_sampling,
    choose_device,
    tokenizer_file,
    wait_without_spinning,
)

if TYPE_CHECKING:
    from megaphi.generate import Completion
    from megaphi.generate.loop import Settings
    from megaphi.model.phi import Phi

# A person watches: a GPU's tokens are looked at more often than a batch needs.
_BUNCH_FOR_STREAM = 4


def _parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(
        prog="megaphi generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="run, checkpoint or Hugging Face directory")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="read the text, or .jsonl: many prompts"
    )
    add_generation_options(parser, max_new_tokens=128, batch_size=16)
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a completion")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text as it grows (default: on a terminal, for one completion)",
    )
    return parser


@dataclass(frozen=True)
class _Request:
    """One completion that is asked for."""

    where: str
    """File and line, or the option, for messages."""
    row: dict[str, Any]
    """What is printed with it, `prompt` among it."""
    sample: int
    seed: int


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status."""
    wait_without_spinning()
    options = _parser().parse_args(argv)
    requests = _requests(options)
    as_json = options.json or _is_list(options.prompt_file)
    if options.stream and (as_json or len(requests) != 1):
        raise ValueError("--stream is for one completion as text, without --json")
    streams = options.stream
    if streams is None:
        streams = not as_json and len(requests) == 1 and sys.stdout.isatty()
    try:
        _complete(options, requests, as_json=as_json, streams=streams)
        sys.stdout.flush()
    except BrokenPipeError:
        # the reader, such as `head`, has what it wants; nothing may be left for Python to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _is_list(path: Path | None) -> bool:
    """Whether a prompt file holds one prompt a line."""
    return path is not None and path.suffix == ".jsonl"


def _requests(options: argparse.Namespace) -> list[_Request]:
    """Check the options and say what is asked for.

    Raises:
        FileNotFoundError, ValueError: an option or a line of the file is not as it must be.
    """
    check_sampling(options)
    for name in ("samples", "batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0")
    if "" in options.stop:
        raise ValueError("--stop must not be empty")
    rows = [("--prompt", {"prompt": options.prompt})]
    if _is_list(options.prompt_file):
        rows = list(_read_prompts(options.prompt_file))
    elif options.prompt_file is not None:
        rows = [(str(options.prompt_file), {"prompt": _read_text(options.prompt_file)})]
    for where, row in rows:
        require_unicode(row["prompt"], f"{where}: the prompt")
    return [
        _Request(where, row, sample, _seed(options.seed, number, sample))
        for number, (where, row) in enumerate(rows)
        for sample in range(options.samples)
    ]


def _read_text(path: Path) -> str:
    """The text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def require_unicode(text: str, what: str) -> None:
    """Raise a `ValueError` for half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has the lone surrogate {text[error.start]!a} at character {error.start}, "
            "which is no Unicode text"
        ) from None


def _read_prompts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of prompts, each with where it stands."""
    found = False
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{path}: line {number} must be an object with a text "prompt"')
        found = True
        yield f"{path}: line {number}", row
    if not found:
        raise ValueError(f"{path}: no prompt in it")


def _seed(seed: int, prompt: int, sample: int) -> int:
    """Seed of one completion; the batch that it is made in does not matter."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _complete(
    options: argparse.Namespace, requests: Sequence[_Request], *, as_json: bool, streams: bool
) -> None:
    """Generate and print."""
    from megaphi.formats.tokenizer_files import end_of_text_id, find_tokenizer
    from megaphi.formats.weights import load_source, resolve_model

    device, dtype = choose_device(options.device, options.dtype)
    source = resolve_model(options.model)
    tokenizer_dir = options.tokenizer or find_tokenizer(source)
    from data_pipeline.tokens.tokenizer_json import read_tokenizer, tokenizer_errors

    tokenizer = read_tokenizer(tokenizer_file(tokenizer_dir or source))
    loaded = load_source(source, device=device, dtype=dtype)
    eos_id = end_of_text_id(tokenizer_dir, loaded.config.vocab_size)
    room = loaded.config.max_sequence_length - options.max_new_tokens
    prompts = []
    for request in requests:
        with tokenizer_errors(tokenizer_dir or source):
            ids = tokenizer.encode(request.row["prompt"], add_special_tokens=False).ids
        if not ids and eos_id is None:
            raise ValueError(
                f"{request.where}: the prompt has no token and the tokenizer no end of text to "
                "start from"
            )
        if len(ids) > room:
            raise ValueError(
                f"{request.where}: the prompt has {len(ids)} tokens; with --max-new-tokens "
                f"{options.max_new_tokens} that is more than the model's "
                f"{loaded.config.max_sequence_length}"
            )
        # an empty prompt starts where a document starts
        prompts.append(ids or [eos_id or 0])

    for first in range(0, len(requests), options.batch_size):
        part = slice(first, first + options.batch_size)
        settings: Settings = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": [request.seed for request in requests[part]],
            "eos_id": eos_id,
            "cuda_graphs": options.cuda_graphs,
        }
        if streams:
            print(requests[0].row["prompt"], end="", flush=True)
            _stream(loaded.model, prompts, tokenizer, options, settings)
            return
        from megaphi.generate import generate_text

        completions = generate_text(
            loaded.model,
            prompts[part],
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
            max_new_tokens=options.max_new_tokens,
            stops=options.stop,
            **settings,
        )
        for request, ids, completion in zip(
            requests[part], prompts[part], completions, strict=True
        ):
            if as_json:
                print(json.dumps(_result(source, request, ids, completion)), flush=True)
                continue
            if len(requests) > 1:
                print(f"--- sample {request.sample + 1} of {options.samples} ---")
            print(request.row["prompt"] + completion.text, flush=True)


def _result(
    source: Path, request: _Request, prompt_ids: list[int], completion: "Completion"
) -> dict[str, Any]:
    """A completion as a JSON object."""
    return {
        **request.row,
        "model": str(source),
        "sample": request.sample,
        "completion": completion.text,
        "prompt_tokens": len(prompt_ids) if request.row["prompt"] else 0,
        "completion_tokens": completion.num_tokens,
        "finish_reason": completion.finish,
    }


def _stream(
    model: "Phi",
    prompts: list[list[int]],
    tokenizer: Any,
    options: argparse.Namespace,
    settings: "Settings",
) -> None:
    """Print one completion as it grows."""
    from megaphi.generate import stream_text

    if model.embedding is not None and model.embedding.tokens.weight.is_cuda:
        settings["bunch"] = _BUNCH_FOR_STREAM
    for event in stream_text(
        model,
        prompts,
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False)),
        max_new_tokens=options.max_new_tokens,
        stops=options.stop,
        **settings,
    ):
        print(event.text, end="", flush=True)
    print()
