"""Tells, while samples come in, whether the next one repeats an earlier one, and when to stop.

MinHash signatures cut into bands (`minhash.py`): 16 bands of 8 rows let two texts of Jaccard
similarity s meet with probability 1 - (1 - s^8)^16, which is one half at 0.67 and 95% at 0.80. The
whole corpus is deduplicated later; this gate saves paying for what would be thrown away then.
"""

from dataclasses import dataclass, field

from data_pipeline.generation.options import WritingOptions
from data_pipeline.similarity.minhash import band_keys, signatures

BANDS, ROWS = 16, 8


@dataclass
class Window:
    """A stretch of the growth curve.

    Attributes:
        asked: samples that came in, whatever became of them.
        new: accepted: sound, and like no earlier one.
        repeated: sound, but like an earlier one.
    """

    asked: int = 0
    new: int = 0
    repeated: int = 0


@dataclass
class NearDuplicateGate:
    """Keeps the band keys of what was accepted, and the growth curve.

    Attributes:
        window: samples in one stretch of the growth curve.
        stop_below: stop when, over a whole window, a smaller share of the sound samples than this
            was new; 0 never stops.
        curve: the windows so far.
    """

    window: int = WritingOptions.window
    stop_below: float = WritingOptions.stop_below
    curve: list[Window] = field(default_factory=list)
    _seen: list[dict[int, str]] = field(default_factory=lambda: [{} for _ in range(BANDS)])

    def admit(self, text: str, name: str) -> str | None:
        """Take a sound sample; returns the name of an earlier one that it repeats, else None."""
        slots, _ = signatures([text.encode("utf-8")])
        keys = [int(key) for key in band_keys(slots, BANDS, ROWS)[:, 0]]
        stretch = self._stretch()
        stretch.asked += 1
        for seen, key in zip(self._seen, keys, strict=True):
            if key in seen:
                stretch.repeated += 1
                return seen[key]
        for seen, key in zip(self._seen, keys, strict=True):
            seen[key] = name
        stretch.new += 1
        return None

    def skip(self) -> None:
        """Count a sample that was not sound."""
        self._stretch().asked += 1

    def _stretch(self) -> Window:
        if not self.curve or self.curve[-1].asked >= self.window:
            self.curve.append(Window())
        return self.curve[-1]

    @property
    def exhausted(self) -> bool:
        """Whether the window that has just ended brought too little that is new."""
        if not self.curve or self.curve[-1].asked < self.window:
            return False
        last = self.curve[-1]
        return last.new < self.stop_below * (last.new + last.repeated)
