"""Prices of models: given by the user, never built in, since they change.

Sums are kept in whole nano-dollars: a cap that is compared with a sum of millions of small charges
must not depend on rounding.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

NANO = 1_000_000_000
MAX_PRICE = 1e6  # US dollars a million tokens; above it is a mistake of units


@dataclass(frozen=True)
class Price:
    """US dollars a million tokens.

    Attributes:
        input: of prompt tokens.
        output: of completion tokens.
        batch: factor on both for requests that come in batches.
    """

    input: float
    output: float
    batch: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.batch <= 1:
            raise ValueError(f"batch price factor {self.batch}: must be from 0 to 1")
        for name, value in (("input", self.input), ("output", self.output)):
            if not (math.isfinite(value) and 0 <= value <= MAX_PRICE):
                raise ValueError(
                    f"{name} price {value}: must be from 0 to {MAX_PRICE:g} (dollars a million "
                    "tokens)"
                )

    def in_batches(self) -> "Price":
        """The price of requests that come in batches."""
        return Price(self.input * self.batch, self.output * self.batch)

    def nano_dollars(self, prompt_tokens: int, completion_tokens: int) -> int:
        """Cost in 1e-9 dollars, rounded up."""
        return math.ceil((prompt_tokens * self.input + completion_tokens * self.output) * 1000)


def read_prices(path: Path) -> dict[str, Price]:
    """Read a price table: `MODEL: {input: 0.15, output: 0.60}`, dollars a million tokens.

    `batch: 0.5` in an entry is the factor on both for the Batch API; without it there is no
    discount.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a table.
    """
    try:
        table: Any = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected lines `MODEL: {{input: PRICE, output: PRICE}}`")
    prices = {}
    for model, entry in table.items():
        values = entry if isinstance(entry, dict) else {}
        if not {"input", "output"} <= set(values) <= {"input", "output", "batch"} or not all(
            isinstance(value, int | float) and not isinstance(value, bool)
            for value in values.values()
        ):
            raise ValueError(
                f"{path}: {model}: expected `{{input: PRICE, output: PRICE}}`, and perhaps "
                "`batch: FACTOR`"
            )
        prices[str(model)] = Price(**{name: float(value) for name, value in values.items()})
    return prices


def dollars(nano: int) -> str:
    """`$1.2345`; small sums keep their digits."""
    value = nano / NANO
    return f"${value:.2f}" if value >= 100 else f"${value:.4f}"
