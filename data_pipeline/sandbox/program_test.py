"""What a program is judged by, prepared once for all its samples."""

import ast
import builtins
import symtable
import sys
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
    """Names of built-ins and modules that the suite's own solution defines: a program may too."""

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
        """Global names that the test reads and does not bind, and the entry point: the candidate's.

        The name of a built-in is among them only if `provided`, and none of Python's own
        (`__builtins__`): a candidate must not replace `len` or `all` under a test.
        """
        free = self._free_names - set(self.modules)
        own = set(vars(builtins)) - self.provided
        found = {name for name in free - own if not name.startswith("__")}
        return sorted(found if self.entry_point is None else found | {self.entry_point})

    @cached_property
    def modules(self) -> list[str]:
        """Modules that the test uses and imports nowhere (`sys.getsizeof`): Python's, trusted.

        A suite may rely on its own solution's imports; a candidate's `math` would be one whose
        `isclose` is always true.
        """
        tree = ast.parse(self.code)
        bases = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        otherwise = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and id(node) not in bases
        }
        candidates = self._free_names & sys.stdlib_module_names
        return sorted(candidates - otherwise - self.provided - {self.entry_point or ""})

    @cached_property
    def imports(self) -> list[str]:
        """Modules that the test cannot do without: those it imports outside of any `try`."""
        found: set[str] = set()
        for code in (self.whole_preamble, self.code):
            pending: list[ast.AST] = [ast.parse(code)]
            while pending:
                node = pending.pop()
                if isinstance(node, ast.Import):
                    found.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module)
                elif not isinstance(node, ast.Try):
                    pending += ast.iter_child_nodes(node)
        return sorted(found)

    @cached_property
    def _free_names(self) -> set[str]:
        """Names that some scope reads as global, and that no scope binds as such."""
        read: set[str] = set()
        bound: set[str] = set()
        tables = [symtable.symtable(self.code, "<test>", "exec")]
        while tables:
            table = tables.pop()
            tables += table.get_children()
            for symbol in table.get_symbols():
                if table.get_type() != "module" and not symbol.is_global():
                    continue
                if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace():
                    bound.add(symbol.get_name())
                if symbol.is_referenced():
                    read.add(symbol.get_name())
        return read - bound
