"""A stage's options dataclass as command line, as keys of a recipe, and back to words.

What an option is called, takes and defaults to is written in the dataclass and nowhere else (see
`data_pipeline.runner.options`). Its name on the command line is `--` and the field with dashes; a
field that is true unless it is switched off is `--no-FIELD`; fields that are dataclasses are groups
whose fields count as the stage's own. Types give the reading of values, docstring lines the help.

This is argparse and not jsonargparse, by which recipes of `megaphi train` are read: importing that
takes longer than all of `megaphi data VERB --help` may.
"""

import argparse
import collections.abc
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from data_pipeline.runner.options import Form

_LISTS = (tuple, collections.abc.Sequence)


@dataclass(frozen=True)
class Option:
    """An option of a stage.

    Attributes:
        name: its field.
        groups: fields that lead to it from the stage's dataclass.
        owner: the dataclass that has the field.
        kind: type of a value: int, float, str, Path or bool.
        choices: the words allowed, () for any.
        many: it takes several values.
        form: how they are written, where the type does not say it.
        placeholder: of a value in the help.
        default: `MISSING` where it must be given.
    """

    name: str
    groups: tuple[str, ...]
    owner: type
    kind: Callable[[str], Any]
    choices: tuple[str, ...]
    many: bool
    form: Form | None
    placeholder: str
    default: Any

    @property
    def is_flag(self) -> bool:
        """It takes no value."""
        return self.kind is bool

    @property
    def positional(self) -> bool:
        """It is given without its name."""
        return self.form is Form.POSITIONAL

    @property
    def key(self) -> str:
        """Its name on the command line without dashes at the start, and in a recipe."""
        negation = "no-" if self.default is True else ""
        return negation + self.name.rstrip("_").replace("_", "-")

    def read(self, words: Sequence[str]) -> Any:
        """The value that words stand for.

        Raises:
            ValueError: they stand for none.
        """
        if self.form is Form.COMMAS:
            words = [part.strip() for word in words for part in word.split(",") if part.strip()]
        elif len(words) != 1 and not self.many:
            raise ValueError(f"`{self.name}` takes one value, not {len(words)}")
        values = [self._read_word(word) for word in words]
        return tuple(values) if self.many else values[0]

    def _read_word(self, word: str) -> Any:
        if self.choices and word not in self.choices:
            raise ValueError(f"`{self.name}`: {word!r} is not one of {', '.join(self.choices)}")
        try:
            return self.kind(word)
        except ValueError:
            kind = getattr(self.kind, "__name__", "")
            raise ValueError(f"`{self.name}`: invalid {kind} value: {word!r}") from None

    def words(self, value: Any) -> list[str]:
        """The words of a command that stand for a value."""
        if value == self.default:
            return []
        if self.is_flag:
            return [f"--{self.key}"]
        values = [str(each) for each in (value if self.many else [value])]
        if self.form is Form.COMMAS:
            values = [",".join(values)]
        if self.positional:
            return values
        if self.form is Form.SEVERAL:
            return [f"--{self.key}", *values]
        # joined where the value would be taken for an option
        return [
            word
            for each in values
            for word in ([f"--{self.key}={each}"] if each[:1] == "-" else [f"--{self.key}", each])
        ]


@functools.cache
def options_of(stage: type) -> Mapping[str, Option]:
    """The options of a stage's dataclass by their fields, those of its groups among them."""
    return {option.name: option for option in _options(stage, ())}


def _options(owner: type, groups: tuple[str, ...]) -> Iterator[Option]:
    for field in fields(owner):
        if is_dataclass(field.type):
            yield from _options(field.type, (*groups, field.name))  # type: ignore[arg-type]
            continue
        kind, notes = _unwrapped(field.type)
        many = get_origin(kind) in _LISTS
        if many:
            kind = get_args(kind)[0]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        names = [note for note in notes if isinstance(note, str)]
        yield Option(
            name=field.name,
            groups=groups,
            owner=owner,
            kind=str if choices else kind,
            choices=choices,
            many=many,
            form=next((note for note in notes if isinstance(note, Form)), None),
            placeholder=names[0] if names else f"{{{','.join(choices)}}}",
            default=field.default,
        )


def _unwrapped(kind: Any) -> tuple[Any, list[Any]]:
    """A type without `Annotated` and `| None`, and the notes that it was annotated with."""
    notes: list[Any] = []
    while True:
        if get_origin(kind) is Annotated:
            notes += kind.__metadata__
            kind = kind.__origin__
        elif get_origin(kind) in (Union, types.UnionType):
            (kind,) = (each for each in get_args(kind) if each is not type(None))
        else:
            return kind, notes


# ---- values ------------------------------------------------------------------------------------


def read_options(stage: type, given: Mapping[str, Sequence[str]]) -> Any:
    """Make a stage's dataclass of words.

    Args:
        stage: the dataclass.
        given: the words of each option that is given, by its field; () for a flag.

    Raises:
        ValueError: a value is missing or wrong, or options exclude each other.
    """
    for one, other in getattr(stage, "ALTERNATIVES", ()):
        if one in given and other in given:
            raise ValueError(f"give `{one}` or `{other}`, not both")
    values = {}
    for name, option in options_of(stage).items():
        if name in given:
            values[name] = (not option.default) if option.is_flag else option.read(given[name])
        elif option.default is MISSING:
            raise ValueError(f"`{name}` is missing")
    return make(stage, values)


def make(stage: type, values: Mapping[str, Any]) -> Any:
    """Make a stage's dataclass of the values of its options, by their fields; others by default.

    Raises:
        ValueError: a value is wrong.
    """
    arguments = {
        field.name: make(field.type, values) if is_dataclass(field.type) else values[field.name]  # type: ignore[arg-type]
        for field in fields(stage)
        if is_dataclass(field.type) or field.name in values
    }
    return stage(**arguments)


def values_of(options: Any) -> dict[str, Any]:
    """The values of all options, those of the groups among them, by their fields."""
    values: dict[str, Any] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        values |= values_of(value) if is_dataclass(value) else {field.name: value}
    return values


def changed(options: Any, **values: Any) -> Any:
    """The same options with other values, by their fields."""
    return make(type(options), values_of(options) | values)


def argv_of(options: Any) -> list[str]:
    """The words of a command line that stand for options, positional ones first."""
    stage: type = type(options)
    known, values = options_of(stage), values_of(options)
    order = sorted(known.values(), key=lambda option: not option.positional)
    return [word for option in order for word in option.words(values[option.name])]


# ---- the command line --------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, stage: type, *, with_help: bool) -> None:
    """Add a stage's options; those that are not given are left out of what is parsed.

    Args:
        parser: of the verb.
        stage: the dataclass.
        with_help: read the docstring lines, which takes a moment.
    """
    places: dict[tuple[str, ...], Any] = {(): parser, ("options",): parser, ("output",): parser}
    for option in options_of(stage).values():
        if option.groups not in places:
            title = option.groups[-1].replace("_", " ")
            text = (option.owner.__doc__ or "").splitlines()[0]
            places[option.groups] = parser.add_argument_group(title, text)
        more: dict[str, Any] = {"help": _help(option) if with_help else ""}
        if option.is_flag:
            more |= {"action": "store_const", "const": ()}
        else:
            more["metavar"] = option.placeholder
            if option.many:
                more["nargs"] = "+" if option.form in _AT_ONCE else None
                more["action"] = "extend" if more["nargs"] else "append"
        if option.positional:
            places[option.groups].add_argument(option.name, default=argparse.SUPPRESS, **more)
        else:
            places[option.groups].add_argument(
                f"--{option.key}",
                dest=option.name,
                default=argparse.SUPPRESS,
                required=option.default is MISSING,
                **more,
            )


_AT_ONCE = (Form.POSITIONAL, Form.SEVERAL)


def _help(option: Option) -> str:
    """The docstring line of an option, with its default where there is one to say."""
    text, default = _docs(option.owner).get(option.name, ""), option.default
    if default not in (MISSING, None, "", ()) and not option.is_flag:
        shown = default if option.many else [default]
        text += f" (default: {' '.join(map(str, shown))})"
    elif option.default is True:
        text = f"Turn off: {text[:1].lower()}{text[1:]}"
    return text.replace("%", "%%")


@functools.cache
def _docs(owner: type) -> dict[str, str]:
    """The docstring lines under the fields of a dataclass and of those that it extends."""
    import docstring_parser

    return {
        each.arg_name: " ".join((each.description or "").split()).removesuffix(".")
        for base in reversed(owner.__mro__)
        if is_dataclass(base)
        for each in docstring_parser.parse_from_object(base).params
    }


# ---- messages ----------------------------------------------------------------------------------


def flags_of_stage(stage: type) -> dict[str, str]:
    """How a user of the command line types the options of a stage, by their fields."""
    return {name: _flag(option) for name, option in options_of(stage).items()}


def _flag(option: Option) -> str:
    if option.positional:
        return option.placeholder
    return f"{option.name} (--{option.key})" if option.default is True else f"--{option.key}"


def keys_of_stage(stage: type) -> dict[str, str]:
    """How a user of a recipe writes the options of a stage, by their fields."""
    return {name: option.key.replace("-", "_") for name, option in options_of(stage).items()}
