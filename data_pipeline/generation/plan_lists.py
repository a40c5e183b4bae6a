"""The lists that plans are made of: basic coding concepts, who learns them, and how.

Replaced by the `lists` of a plan.
"""


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str, mark: str) -> list[str]:
    return [phrase.strip() for phrase in text.replace("\n", mark).split(mark) if phrase.strip()]


TOPICS = _phrases(
    """
variables and assignment; arithmetic and operator precedence; integers, floats and rounding
strings and slicing; string formatting; string searching and replacing; characters and code points
boolean logic; comparison chains; if, elif and else; nested conditions; guard clauses; while loops
for loops and range; nested loops; break and continue; accumulating a result in a loop
lists and indexing; list comprehensions; tuples and unpacking; sets and membership tests
dictionaries; counting with dictionaries; grouping values by a key; nested dictionaries
functions and return values; default and keyword arguments; variable scope; pure functions
functions as values; lambda expressions; map, filter and reduce; closures; decorators; recursion
recursion on lists; memoisation; generators and yield; iterators; exceptions; validating input
assertions and tests; reading and writing text; parsing lines of text; regular expressions
classes and objects; methods and attributes; inheritance; dataclasses; operator methods
stacks; queues; linked lists; binary trees; tree traversal; heaps and priority queues; graphs
breadth-first search; depth-first search; shortest paths; linear search; binary search
bubble and insertion sort; merge sort; quicksort; sorting with a key; two pointers
sliding windows; prefix sums; greedy choice; backtracking; divide and conquer; dynamic programming
matrices and grids; simulating a process; prime numbers; greatest common divisor
number bases and bits; modular arithmetic; combinations and permutations; probability by counting
dates and times; simple encryption; text statistics; state machines; big-O running time
""",
    ";",
)

AUDIENCES = [
    "school pupils who have never programmed",
    "first-year students of computer science",
    "scientists who analyse data",
    "adults who change to a programming job",
    "spreadsheet users who want to automate their work",
    "programmers who know another language",
    "teachers who prepare a lesson",
    "hobbyists who build small games",
]

DIFFICULTIES = ["introductory", "intermediate", "challenging"]

STYLES = [
    "a textbook section with one worked example",
    "a dialogue between a teacher and a curious student",
    "a step-by-step derivation from a naive to a good solution",
    "an explanation of a common mistake and its repair",
    "a small case study from everyday life",
    "a comparison of two ways to solve the same problem",
]

PROFESSIONS = _phrases(
    """
baker, librarian, nurse, gardener, bus driver, astronomer, biologist, accountant, carpenter
musician, farmer, sailor, teacher, architect, journalist, chemist, referee, pharmacist, tailor
geologist, electrician, postal worker, museum guide, photographer, meteorologist, chess player
cook, mechanic, translator, beekeeper
""",
    ",",
)

VERBS = _words(
    """
count find remove replace merge split group sort filter validate convert compute rotate reverse
normalize encode decode rank flatten partition select combine shift expand compress match
sum_of first_of last_of average_of
"""
)

THINGS = _words(
    """
words digits vowels pairs intervals scores prices names dates temperatures letters lines steps
neighbors peaks gaps duplicates brackets coins cards tickets routes levels rows columns diagonals
segments tokens records votes marks heights weights distances durations orders codes labels
fractions primes factors multiples squares sequences cycles islands paths trees leaves nodes
"""
)

WORDS = _words(
    """
acorn anchor apple arrow balloon basket bicycle blanket bottle bridge bucket butterfly cabin camera
candle canyon carpet castle cedar circus clay cloud compass copper cradle crystal curtain desert
dolphin dragon drum eagle echo engine feather ferry festival flute forest fountain fox galaxy garden
glacier glove guitar hammer harbor harvest helmet honey horizon island jacket jungle kettle kite
ladder lantern lemon lighthouse magnet maple marble market meadow mirror mountain museum nest
notebook oak ocean olive orchard otter paddle palace paper parrot pebble pepper piano pillow planet
pocket pond puzzle rabbit railway rainbow recipe ribbon river robot rocket saddle sail salt sandal
scarf seashell shadow shovel silver snail spoon station storm sugar sunrise tea telescope tent
theater thunder tiger tower train treasure tunnel turtle umbrella valley velvet village violin
volcano wagon walnut waterfall whale wheel willow window winter wizard wool
"""
)
