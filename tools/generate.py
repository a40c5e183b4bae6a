"""`megaphi generate MODEL --prompt TEXT`: complete a text with a trained model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_DTYPES = ("auto", "fp32", "bf16", "fp16")


def _parser() -> argparse.ArgumentParser:
    """The options of the verb."""
    parser = argparse.ArgumentParser(prog="megaphi generate", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="run, checkpoint or Hugging Face directory")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", help="the text to continue")
    text.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the text from a file")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: most probable token")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument("--dtype", choices=_DTYPES, default="auto", help="auto: bf16 on a GPU")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="instead of the model's own")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the verb; returns the exit status."""
    options = _parser().parse_args(argv)
    prompt = options.prompt
    if options.prompt_file is not None:
        prompt = options.prompt_file.read_text(encoding="utf-8")

    from megaphi.checkpoint.tokenizer_files import end_of_text_id, find_tokenizer
    from megaphi.checkpoint.weights import load_source, resolve_model
    from megaphi.generate import generate

    device, dtype = choose_device(options.device, options.dtype)
    source = resolve_model(options.model)
    tokenizer_dir = options.tokenizer or find_tokenizer(source)
    tokenizer = load_tokenizer(tokenizer_dir, source)
    loaded = load_source(source, device=device, dtype=dtype)
    eos_id = end_of_text_id(tokenizer_dir, loaded.config.vocab_size)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    if not prompt_ids and eos_id is None:
        raise ValueError("the prompt has no token and the tokenizer no end of text to start from")

    printer = _Printer(tokenizer) if not options.json and sys.stdout.isatty() else None
    if printer is not None:
        print(prompt, end="", flush=True)
    (completion_ids,) = generate(
        loaded.model,
        # an empty prompt starts where a document starts
        [prompt_ids or [eos_id or 0]],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        eos_id=eos_id,
        stop=printer,
    )
    completion = tokenizer.decode(completion_ids, skip_special_tokens=False)
    if options.json:
        result = {
            "model": str(loaded.source),
            "prompt": prompt,
            "completion": completion,
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(completion_ids),
            "finish_reason": "length" if len(completion_ids) == options.max_new_tokens else "stop",
        }
        print(json.dumps(result))
    elif printer is not None:
        printer.finish(completion)
    else:
        print(prompt + completion)
    return 0


def choose_device(device: str, dtype: str) -> "tuple[torch.device, torch.dtype]":
    """Resolve `auto`: the GPU if there is one; bf16 there and fp32 on a CPU.

    Raises:
        ValueError: the device is not a name that PyTorch knows, or is not there.
    """
    import torch

    from megaphi.checkpoint.files import DTYPE_NAMES

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used: {reason}") from None
    if dtype == "auto":
        dtype = "fp32" if chosen.type == "cpu" else "bf16"
    return chosen, DTYPE_NAMES[dtype]


def load_tokenizer(tokenizer_dir: Path | None, source: Path) -> Any:
    """Load tokenizer.json; text that looks like a special token stays text.

    Raises:
        ValueError: there is none, or it is not readable.
    """
    if tokenizer_dir is None or not (tokenizer_dir / "tokenizer.json").is_file():
        raise ValueError(
            f"{tokenizer_dir or source}: no tokenizer.json; name its directory with --tokenizer DIR"
        )
    import tokenizers

    path = tokenizer_dir / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer ({error})") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


class _Printer:
    """A `stop` callback that prints the text as it grows and never stops."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.printed = ""

    def __call__(self, _: int, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        # a character may need several tokens; half of one decodes to U+FFFD
        if not text.endswith("\ufffd"):
            self.finish(text, end="")
        return False

    def finish(self, text: str, end: str = "\n") -> None:
        """Print what is left of the whole text."""
        print(text.removeprefix(self.printed), end=end, flush=True)
        self.printed = text
