"""Textbook sections: an operation explained, worked through by hand, written, and its pitfalls."""

import random

from data_pipeline.small_programs.exercise import Function, draw_inputs, write_function
from data_pipeline.small_programs.values import DESCRIPTIONS, MAX_EXAMPLE, PARAMETERS, draw
from data_pipeline.small_programs.wording import nest, put
from data_pipeline.small_programs.world import TOO_WIDE, Composition, World, run

DEEPEST = 2  # sections explain single operations, and pairs of them
_OPENINGS = (
    "In this section we look at {phrase}.",
    "A common task is to find {phrase}.",
    "Programs often need {phrase}.",
    "Here is how to get {phrase}.",
)


def write_section(
    world: World, rng: random.Random, among: list[Composition]
) -> tuple[str, Function]:
    """One section.

    Args:
        world: for its compositions; primitives that only textbooks have are as frequent as others.
        rng: of the sample.
        among: the compositions to choose from; empty for all that may be taught.

    Returns:
        The text, Markdown with a fenced function, and that function.
    """
    alone = world.textbook_only
    if among:
        composition = rng.choice(among)
    elif alone and rng.randrange(len(alone) + len(world.exercised)) < len(alone):
        composition = (rng.choice(alone),)
    else:
        composition = world.draw_any(rng, min(world.depth, DEEPEST))
    function = write_function(composition, world, rng)
    parameter = rng.choice(PARAMETERS[composition[0].takes][:1])
    phrases = tuple(_taught_phrase(world, step.phrasings, rng) for step in composition)
    title = " ".join(step.name for step in composition).replace("_", " ")
    parts = [
        f"# {title[0].upper()}{title[1:]}",
        _opening(composition, phrases, parameter, world, rng),
        _worked_example(composition, phrases, function, rng),
        f"As a function:\n\n```python\n{function.text}```",
        _pitfalls(composition, phrases, world, rng),
    ]
    return "\n\n".join(parts) + "\n", function


def _taught_phrase(world: World, phrasings: tuple[str, ...], rng: random.Random) -> str:
    count = world.options.phrasings or len(phrasings)
    return rng.choice(phrasings[:-1][:count])


def _opening(
    composition: Composition,
    phrases: tuple[str, ...],
    parameter: str,
    world: World,
    rng: random.Random,
) -> str:
    phrase = nest(phrases, parameter)
    article = DESCRIPTIONS[composition[0].takes]
    text = rng.choice(_OPENINGS).format(phrase=phrase)
    text += f" The input {parameter} is {article} and the result is "
    text += f"{DESCRIPTIONS[composition[-1].gives]}."
    if len(composition) == 1:
        other = put(_taught_phrase(world, composition[0].phrasings, rng), parameter)
        if other != phrase:
            text += f" One may also call it {other}."
    return text


def _worked_example(
    composition: Composition, phrases: tuple[str, ...], function: Function, rng: random.Random
) -> str:
    """An input taken through the steps one by one."""
    short = [value for value in function.inputs if value and len(repr(value)) <= MAX_EXAMPLE]
    value = rng.choice(short or list(function.inputs))
    lines = [f"Take {value!r}."]
    for place, (step, phrase) in enumerate(zip(composition, phrases, strict=True)):
        result = run((step,), value)
        lead = "" if len(composition) == 1 else f"Step {place + 1}: "
        said = put(phrase, repr(value))
        if said.startswith("whether "):
            lines.append(f"{lead}We ask {said}. The answer is {result!r}.")
        else:
            lines.append(f"{lead}We find {said}. This gives {result!r}.")
        value = result
    return "\n".join(lines)


def _pitfalls(
    composition: Composition, phrases: tuple[str, ...], world: World, rng: random.Random
) -> str:
    """What the composition does on odd input, and what it must not be taken for."""
    lines = ["What can go wrong:"]
    for shape in ("empty", "negative", "repeated"):
        value = draw(composition[0].takes, shape, rng)
        result = run(composition, value)
        if result is not TOO_WIDE and len(repr(value)) <= MAX_EXAMPLE:
            lines.append(f"- For {value!r} the result is {result!r}.")
    lines += [f"- {note}" for note in dict.fromkeys(s.note for s in composition) if note]
    others = world.confusions(composition)
    if others:
        other = rng.choice(others)
        said = nest([_taught_phrase(world, step.phrasings, rng) for step in other], "the input")
        for value in draw_inputs(composition, rng, 6):
            right, mistaken = run(composition, value), run(other, value)
            if mistaken is not TOO_WIDE and repr(right) != repr(mistaken):
                lines.append(
                    f"- Do not confuse this with {said}: for {value!r} that is {mistaken!r}, and "
                    f"not {right!r}."
                )
                break
    return "\n".join(lines)
