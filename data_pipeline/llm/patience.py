"""Gives up a run whose answers are all unusable, before the rest of them is paid."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from megaphi.errors import RunError

FEW = 8  # answers that the server or an option spoils, all of them
MANY = 32  # that the model spoils: one that is often wrong is still of use
_ROOM = "give thoughts room with `reasoning_tokens`, or raise `max_tokens`"
_ADVICE = {
    "truncated": _ROOM,
    "no_content": _ROOM + ", where the tokens went into thoughts",
    "thoughts": _ROOM,
    "refused": "ask another `model`, or in other words",
    "no_answer": "see what the server says",
}


@dataclass
class Patience:
    """Counts unusable answers until the first one that is of use.

    Attributes:
        otherwise: what to do where a reason has no advice.
        advice: what to do by reason, beyond what is the same everywhere.
        reasons: of the answers so far.
    """

    otherwise: str
    advice: Mapping[str, str]
    reasons: Counter[str] = field(default_factory=Counter)
    _ended: bool = False

    def take(self, reason: str | None, detail: str, ledger: object) -> None:
        """Note why an answer is of no use; None where it is.

        Args:
            reason: a short fixed word.
            detail: what was seen.
            ledger: the file in which the answers are kept.

        Raises:
            RunError: none was of use, and enough were asked for.
        """
        self._ended |= reason is None
        if self._ended or reason is None:
            return
        self.reasons[reason] += 1
        spoilt = sum(self.reasons[name] for name in _ADVICE)
        total = self.reasons.total()
        if spoilt == total >= FEW or total >= MANY:
            common, count = self.reasons.most_common(1)[0]
            advice = _ADVICE.get(common) or self.advice.get(common) or self.otherwise
            raise RunError(
                f"none of the first {total} answers can be used ({count} {common}; the last: "
                f"{detail}): {advice}; they are kept in {ledger}"
            )
