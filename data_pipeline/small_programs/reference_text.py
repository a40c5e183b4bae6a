"""The meaning of the primitives on strings, lists of strings and dictionaries; see `reference`."""

import itertools
import operator
import re
from collections.abc import Callable
from typing import Any

from data_pipeline.small_programs.reference import VOWELS, _tally, _words

STRINGS: dict[str, Callable[[Any], Any]] = {
    "to_upper": lambda x: x.translate({i: i - 32 for i in range(97, 123)}),
    "to_lower": lambda x: x.translate({i: i + 32 for i in range(65, 91)}),
    "swap_case": lambda x: "".join(chr(ord(c) ^ 32) if c.isalpha() else c for c in x),
    "reverse_text": lambda x: "".join(x[len(x) - 1 - i] for i in range(len(x))),
    "drop_vowels": lambda x: re.sub("[aeiouAEIOU]", "", x),
    "keep_vowels": lambda x: re.sub("[^aeiouAEIOU]", "", x),
    "keep_letters": lambda x: re.sub("[^a-zA-Z]", "", x),
    "drop_spaces": lambda x: "".join(x.split(" ")),
    "double_letters": lambda x: re.sub("(.)", r"\1\1", x),
    "hyphenate": lambda x: re.sub("(?<=.)(?=.)", "-", x),
    "spaces_to_underscores": lambda x: x.translate({32: 95}),
    "first_word": lambda x: next(iter(_words(x)), ""),
    "last_word": lambda x: next(reversed(_words(x)), ""),
    "drop_first_letter": lambda x: "".join(itertools.islice(x, 1, None)),
    "first_letter": lambda x: next(iter(x), ""),
    "strip_spaces": lambda x: re.sub("^ +| +$", "", x),
    "sort_letters": lambda x: "".join(c * x.count(c) for c in sorted(set(x))),
    "drop_repeated_letters": lambda x: "".join(_tally(x)),
    "add_exclamation": lambda x: operator.concat(x, chr(33)),
    "initials": lambda x: "".join(re.findall(r"(?<!\S)\S", x)),
    "reverse_word_order": lambda x: " ".join(sorted(_words(x), key=lambda w: 0)[::-1]),
    "text_length": lambda x: x.__len__(),
    "count_vowels": lambda x: sum(c in VOWELS for c in x),
    "count_capitals": lambda x: len(re.findall("[A-Z]", x)),
    "count_digit_characters": lambda x: len(re.findall("[0-9]", x)),
    "count_spaces": lambda x: len(x.split(" ")) - 1,
    "count_words": lambda x: len(_words(x)),
    "count_distinct_letters": lambda x: len(_tally(x)),
    "is_palindrome": lambda x: list(x) == list(reversed(x)),
    "starts_with_vowel": lambda x: re.match("[aeiouAEIOU]", x) is not None,
    "has_digit": lambda x: re.search("[0-9]", x) is not None,
    "is_longer_than_five": lambda x: re.fullmatch(".{6,}", x) is not None,
    "split_words": _words,
    "list_letters": lambda x: [x[i] for i in range(len(x))],
    "list_prefixes": lambda x: list(itertools.accumulate(x)),
    "vowel_positions": lambda x: [m.start() for m in re.finditer("[aeiouAEIOU]", x)],
    "count_each_letter": lambda x: _tally(x),
    "count_each_word": lambda x: _tally(_words(x)),
}

WORDS: dict[str, Callable[[Any], Any]] = {
    "upper_each": lambda x: list(map(str.upper, x)),
    "capitalize_each": lambda x: [w[:1].upper() + w[1:].lower() for w in x],
    "reverse_each": lambda x: ["".join(reversed(w)) for w in x],
    "first_letters": lambda x: [next(iter(w), "") for w in x],
    "mark_each": lambda x: [operator.concat(w, chr(33)) for w in x],
    "keep_long": lambda x: [w for w in x if re.match("....", w)],
    "keep_short": lambda x: [w for w in x if not re.match("....", w)],
    "keep_with_vowel_start": lambda x: [w for w in x if re.match("[aeiouAEIOU]", w)],
    "keep_with_a": lambda x: [w for w in x if w.find("a") >= 0],
    "drop_empty": lambda x: list(filter(None, x)),
    "sort_words": lambda x: sorted(x, key=str),
    "sort_by_length": lambda x: [
        w for size in sorted(set(map(len, x))) for w in x if len(w) == size
    ],
    "reverse_words": lambda x: [x[len(x) - 1 - i] for i in range(len(x))],
    "drop_duplicate_words": lambda x: [w for i, w in enumerate(x) if w not in x[:i]],
    "drop_first_word": lambda x: list(itertools.islice(x, 1, None)),
    "join_words": lambda x: "".join(w if not i else f" {w}" for i, w in enumerate(x)),
    "join_with_hyphens": lambda x: "".join(w if not i else f"-{w}" for i, w in enumerate(x)),
    "concatenate": lambda x: "".join(itertools.chain.from_iterable(x)),
    "longest_word": lambda x: next(iter(sorted(x, key=lambda w: -len(w))), ""),
    "shortest_word": lambda x: next(iter(sorted(x, key=len)), ""),
    "first_string": lambda x: next(iter(x), ""),
    "last_string": lambda x: next(reversed(x), ""),
    "count_strings": lambda x: x.__len__(),
    "total_length": lambda x: len("".join(x)),
    "count_distinct_strings": lambda x: len(_tally(x)),
    "word_lengths": lambda x: [w.__len__() for w in x],
    "has_empty_string": lambda x: x.count("") > 0,
    "all_short": lambda x: max(map(len, x), default=0) <= 5,
    "has_repeated_string": lambda x: max(_tally(x).values(), default=0) > 1,
    "count_each_string": lambda x: _tally(x),
    "lengths_by_word": lambda x: dict(zip(x, map(len, x), strict=True)),
    "shortest_and_longest": lambda x: (
        min(map(len, x), default=0),
        max(map(len, x), default=0),
    ),
    "list_keys": lambda x: [*x],
    "list_values": lambda x: [value for _, value in x.items()],
    "sum_values": lambda x: sum(value for _, value in x.items()),
    "largest_value": lambda x: next(iter(sorted(x.values(), reverse=True)), 0),
    "count_keys": lambda x: x.__len__(),
    "key_of_largest": lambda x: next(
        (key for key, value in x.items() if value == max(x.values())), ""
    ),
    "drop_single": lambda x: dict(filter(lambda item: item[1] >= 2, x.items())),
    "double_values": lambda x: dict(zip(x, [v + v for v in x.values()], strict=True)),
    "increase_values": lambda x: dict(zip(x, [-~v for v in x.values()], strict=True)),
    "sort_keys": lambda x: sorted(x, key=str),
    "has_zero_value": lambda x: list(x.values()).count(0) > 0,
    "keep_long_keys": lambda x: dict(filter(lambda item: re.match("....", item[0]), x.items())),
}
