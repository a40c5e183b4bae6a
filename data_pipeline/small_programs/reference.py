"""What each primitive means, written a second time and apart from the code that is taught.

A text is only written when its function agrees with these on drawn inputs, so a slip in
`primitives/*.yaml` shows as a disagreement instead of as a wrong lesson. The forms here avoid the
idioms there: they go through the standard library where the idioms loop, and loop where they call
a builtin. None of them changes its argument.
"""

import collections
import functools
import itertools
import math
import operator
import re
import statistics
import string
from collections.abc import Callable
from fractions import Fraction
from typing import Any

VOWELS = frozenset("aeiouAEIOU")
_get = operator.itemgetter


def _tally(items: Any) -> dict[Any, int]:
    """Counts in the order of first occurrence."""
    return dict(collections.Counter(items))


def _first_with_most(items: Any, empty: Any) -> Any:
    """The most common item, the first of equals."""
    return collections.Counter(items).most_common(1)[0][0] if items else empty


def _digits(number: int) -> list[int]:
    return [string.digits.index(c) for c in re.findall(r"\d", str(number))]


def _words(text: str) -> list[str]:
    return re.findall(r"\S+", text)


def _is_prime(n: int) -> bool:
    return n >= 2 and not [d for d in range(2, math.isqrt(n) + 1) if math.gcd(d, n) == d]


def _extreme(items: list[Any], place: int, empty: Any) -> Any:
    return next(iter(sorted(items)[place:]), empty)


LISTS: dict[str, Callable[[Any], Any]] = {
    "keep_even": lambda x: list(itertools.filterfalse(lambda n: n & 1, x)),
    "keep_odd": lambda x: [n for n in x if n & 1],
    "keep_positive": lambda x: [n for n in x if max(n, 0) == n and n],
    "keep_negative": lambda x: [n for n in x if str(n).startswith("-")],
    "keep_above_ten": lambda x: [n for n in x if n - 10 >= 1],
    "keep_multiples_of_three": lambda x: [n for n in x if n == 3 * math.floor(n / 3)],
    "drop_zeros": lambda x: list(filter(None, x)),
    "double_each": lambda x: [n + n for n in x],
    "square_each": lambda x: [pow(abs(n), 2) for n in x],
    "add_one_each": lambda x: [-~n for n in x],
    "negate_each": lambda x: list(map(operator.neg, x)),
    "absolute_each": lambda x: [max(n, -n) for n in x],
    "halve_each": lambda x: [n >> 1 for n in x],
    "remainders_by_three": lambda x: [n - 3 * math.floor(n / 3) for n in x],
    "cap_at_ten": lambda x: [sorted((n, 10))[0] for n in x],
    "sort_ascending": lambda x: sorted(x, key=float),
    "sort_descending": lambda x: sorted(x, key=operator.neg),
    "reverse_list": lambda x: [x[len(x) - 1 - i] for i in range(len(x))],
    "drop_duplicates": lambda x: [n for i, n in enumerate(x) if n not in x[:i]],
    "drop_first": lambda x: list(itertools.islice(x, 1, None)),
    "drop_last": lambda x: [n for i, n in enumerate(x) if i + 1 < len(x)],
    "first_three": lambda x: list(itertools.islice(x, 3)),
    "last_three": lambda x: list(collections.deque(x, maxlen=3)),
    "every_second": lambda x: list(itertools.islice(x, 0, None, 2)),
    "running_totals": lambda x: list(itertools.accumulate(x)),
    "running_maxima": lambda x: list(itertools.accumulate(x, max)),
    "differences": lambda x: [b - a for a, b in itertools.pairwise(x)],
    "rotate_left": lambda x: [x[(i + 1) % len(x)] for i in range(len(x))],
    "sum_all": lambda x: functools.reduce(operator.add, x, 0),
    "multiply_all": lambda x: math.prod(x),
    "find_largest": lambda x: _extreme(x, -1, 0),
    "find_smallest": lambda x: _extreme(x, 0, 0),
    "count_items": lambda x: x.__len__(),
    "count_even": lambda x: [n & 1 for n in x].count(0),
    "count_positive": lambda x: [n >= 1 for n in x].count(True),
    "count_distinct": lambda x: len(collections.Counter(x)),
    "count_increases": lambda x: [b > a for a, b in itertools.pairwise(x)].count(True),
    "first_number": lambda x: next(iter(x), 0),
    "last_number": lambda x: next(reversed(x), 0),
    "middle_number": lambda x: next(iter(x[len(x) >> 1 :]), 0),
    "find_range": lambda x: _extreme(x, -1, 0) - _extreme(x, 0, 0),
    "alternating_sum": lambda x: sum(n * (-1) ** i for i, n in enumerate(x)),
    "index_of_largest": lambda x: min(
        (i for i, n in enumerate(x) if n == sorted(x)[-1]), default=-1
    ),
    "most_common": lambda x: _first_with_most(x, 0),
    "mean_of": lambda x: float(Fraction(sum(x), len(x) or 1)),
    "median_of": lambda x: float(statistics.median(x)) if x else 0.0,
    "all_positive": lambda x: min(x, default=1) >= 1,
    "all_even": lambda x: not functools.reduce(operator.or_, [n & 1 for n in x], 0),
    "any_negative": lambda x: min(x, default=0) < 0,
    "contains_zero": lambda x: x.count(0) > 0,
    "is_sorted": lambda x: not any(a > b for a, b in itertools.pairwise(x)),
    "has_duplicates": lambda x: max(collections.Counter(x).values(), default=0) > 1,
    "reads_same_backwards": lambda x: all(map(operator.eq, x, reversed(x))),
    "numbers_to_strings": lambda x: [f"{n:d}" for n in x],
    "join_numbers": lambda x: str(x).replace(" ", "").strip("[]"),
    "count_by_parity": lambda x: {
        "even": sum(not n & 1 for n in x),
        "odd": sum(n & 1 for n in x),
    },
    "smallest_and_largest": lambda x: (_extreme(x, 0, 0), _extreme(x, -1, 0)),
    "first_and_last": lambda x: (next(iter(x), 0), next(reversed(x), 0)),
}

NUMBERS: dict[str, Callable[[Any], Any]] = {
    "double": lambda x: x << 1,
    "square": lambda x: abs(x) ** 2,
    "add_one": lambda x: -~x,
    "negate": lambda x: ~x + 1,
    "absolute_value": lambda x: math.isqrt(x * x),
    "halve": lambda x: divmod(x, 2)[0],
    "sum_digits": lambda x: sum(_digits(x)),
    "count_digits": lambda x: len(_digits(x)),
    "reverse_digits": lambda x: sum(d * 10**i for i, d in enumerate(_digits(x))),
    "last_digit": lambda x: _digits(x)[-1],
    "sum_up_to": lambda x: math.comb(x + 1, 2) if x > 0 else 0,
    "collatz_step": lambda x: 3 * x + 1 if x & 1 else x >> 1,
    "subtract_from_hundred": lambda x: operator.sub(100, x),
    "clamp_to_hundred": lambda x: sorted((0, x, 100))[1],
    "is_even": lambda x: not x & 1,
    "is_positive": lambda x: x >= 1,
    "is_multiple_of_three": lambda x: sum(_digits(x)) % 3 == 0,
    "is_prime": _is_prime,
    "is_square": lambda x: x >= 0 and math.isqrt(x) ** 2 == x,
    "number_to_text": lambda x: format(x, "d"),
    "to_binary": lambda x: re.sub("[^01]|0b", "", bin(x)),
    "row_of_stars": lambda x: "".ljust(max(x, 0), "*"),
    "count_up": lambda x: list(itertools.islice(itertools.count(1), max(x, 0))),
    "count_down": lambda x: sorted(range(1, x + 1), key=operator.neg),
    "list_digits": _digits,
    "list_divisors": lambda x: [d for d in range(1, max(x, 0) + 1) if math.gcd(d, x) == d],
    "first_multiples": lambda x: list(itertools.accumulate([x] * 3)),
    "half_exactly": lambda x: float(Fraction(x, 2)),
    "divide_by_seven": lambda x: (math.floor(Fraction(x, 7)), x - 7 * math.floor(Fraction(x, 7))),
    "number_and_square": lambda x: (x, abs(x) ** 2),
    "add_half": lambda x: x - -0.5,
    "double_float": lambda x: x / 0.5,
    "absolute_float": lambda x: math.fabs(x),
    "to_fahrenheit": lambda x: operator.truediv(9 * x, 5) + 32.0,
    "truncate": lambda x: math.trunc(x),
    "round_down": lambda x: math.floor(x),
    "round_up": lambda x: math.ceil(x),
    "is_whole": lambda x: math.modf(x)[0] == 0,
    "is_below_freezing": lambda x: min(x, 0.0) != 0.0,
    "float_to_text": lambda x: format(x, ""),
    "opposite": lambda x: operator.not_(x),
    "as_number": lambda x: [False, True].index(x),
    "yes_or_no": lambda x: {True: "yes", False: "no"}[x],
    "sum_pair": lambda x: operator.add(*x),
    "product_pair": lambda x: math.prod(x),
    "difference_pair": lambda x: operator.sub(*x),
    "larger_of_pair": lambda x: sorted(x)[1],
    "smaller_of_pair": lambda x: sorted(x)[0],
    "first_of_pair": _get(0),
    "second_of_pair": _get(1),
    "swap_pair": _get(1, 0),
    "sort_pair": lambda x: x if x[0] <= x[1] else _get(1, 0)(x),
    "pair_to_list": lambda x: [*x],
    "numbers_between": lambda x: [n for n in range(min(x), max(x)) if x[0] < x[1]],
    "are_equal": lambda x: operator.eq(*x),
    "is_rising_pair": lambda x: operator.lt(*x),
}
