"""What a program is judged by, prepared once for all its samples."""

import ast
import builtins
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class ProgramTest:
    """What a program is judged by; it never enters the program's process."""

    code: str
    """Python; the program passes if this runs to its end."""
    preamble: str = ""
    """Trusted code that the test needs before it: the prompt's helpers, imports."""
    entry_point: str | None = None
    """The function under test; None where the test itself names what it calls."""
    provided: frozenset[str] = frozenset()
    """Built-in names that the suite's own solution defines, so that a program may as well."""

    @cached_property
    def whole_preamble(self) -> str:
        """The preamble as whole code: a prompt may end where the body is to be written."""
        for ending in ("", "\n    pass\n", "\n\tpass\n"):
            try:
                ast.parse(self.preamble + ending)
            except SyntaxError:
                continue
            return self.preamble + ending
        return ""

    @cached_property
    def names(self) -> list[str]:
        """Names that the test reads and nowhere binds, and the entry point: the candidate's.

        A built-in name is among them only if `provided`: a candidate must not replace `len` or
        `all` under a test.
        """
        read = set() if self.entry_point is None else {self.entry_point}
        bound = set(vars(builtins)) - self.provided
        for node in ast.walk(ast.parse(self.code)):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).partition(".")[0])
        return sorted(name for name in read if name == self.entry_point or name not in bound)
