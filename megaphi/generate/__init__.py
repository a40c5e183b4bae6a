"""Text generation: batches of any lengths, a preallocated key/value cache, CUDA graphs, streaming.

- `generate` continues token sequences; `stream_tokens` yields the tokens as they come.
- `generate_text` and `stream_text` do the same for text, with stop texts.

The prompts of a batch are padded on the left so that all rows end together; padding is masked as a
key and does not count as a position, so a row's result is what it would be alone. The prompts run
through the model once, every further token costs one pass over one position.
"""

from megaphi.generate.loop import Finish, Settings, TokenEvent, generate, stream_tokens
from megaphi.generate.text import (
    Completion,
    TextEvent,
    TextRow,
    generate_text,
    stream_text,
)

__all__ = [
    "Completion",
    "Finish",
    "Settings",
    "TextEvent",
    "TextRow",
    "TokenEvent",
    "generate",
    "generate_text",
    "stream_text",
    "stream_tokens",
]
