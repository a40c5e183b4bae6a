"""Where the documents of a micro-batch begin, so that attention can stay inside of them.

A sample holds the ends and beginnings of several documents, each ended by the EOD token. The bounds
are found on the host, where the tokens are before they travel to the device: finding them there
would make the host wait. Positions are not counted anew in each document, since the rotary
embedding only depends on differences of positions.

Suffixes: b batch, t time.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaphi.device import to_device

_LENGTH_STEP = 128
"""Multiple of `Documents.longest`: the kernels' blocks of queries are this long or shorter."""


@dataclass(frozen=True)
class Documents:
    """The documents of a micro-batch of rows of t tokens; a row's end also ends a document."""

    starts: Tensor
    """int32 [n + 1]: where each document starts in the flattened [b x t] tokens, then b x t, as
    the variable-length kernels want it. n is rounded up to a power of two, so that few different
    sizes are ever seen; the documents at the end that this adds are empty."""
    longest: int
    """No document has more tokens: the longest one's length, rounded up to 128, at most t."""
    ids_bt: Tensor
    """int32: number of the document that a token belongs to."""

    def to(self, device: torch.device) -> "Documents":
        """The same on `device`; to a GPU without waiting for the copy."""
        return Documents(
            to_device(self.starts, device), self.longest, to_device(self.ids_bt, device)
        )


def find_documents(tokens_bt: NDArray[np.int64], eod_id: int) -> Documents:
    """Cut rows of tokens into documents, on the host.

    The EOD token belongs to the document that it ends.

    Args:
        tokens_bt: token ids.
        eod_id: id that ends a document.

    Returns:
        The documents, with tensors in CPU memory.
    """
    rows, time = tokens_bt.shape
    begins_bt = np.ones((rows, time), np.bool_)
    begins_bt[:, 1:] = tokens_bt[:, :-1] == eod_id
    begins = np.flatnonzero(begins_bt)
    starts = np.full(_next_power_of_two(len(begins)) + 1, rows * time, np.int32)
    starts[: len(begins)] = begins
    longest = int(np.diff(starts).max())
    longest = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, time)
    ids_bt = (np.cumsum(begins_bt, dtype=np.int32) - 1).reshape(rows, time)
    return Documents(torch.from_numpy(starts), longest, torch.from_numpy(ids_bt))


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
