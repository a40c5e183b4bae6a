"""Installed packages that programs in the sandbox may import, besides the standard library.

A package is what its distribution has installed in one folder, with what it
requires in turn where that is installed too. The sandbox sees these entries and nothing else of the
folder, read-only.
"""

import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path

DEFAULT = "numpy"


@dataclass(frozen=True)
class Packages:
    """What is given to the sandbox.

    Attributes:
        versions: of the packages that were asked for, by the name that a program imports.
        entries: files and folders of the packages and of what they require.
        required: whether the sandbox is an error without one of them.
    """

    versions: tuple[tuple[str, str], ...] = ()
    entries: tuple[Path, ...] = ()
    required: bool = True

    @property
    def names(self) -> list[str]:
        """What a program imports."""
        return [name for name, _ in self.versions]


NO_PACKAGES = Packages()


def find_packages(names: list[str] | None) -> Packages:
    """Installed packages by the name that a program imports, such as `numpy` or `sklearn`.

    Args:
        names: None for the default: numpy, where it is installed.

    Raises:
        ValueError: one is not installed.
    """
    distributions = importlib.metadata.packages_distributions()
    wanted = [name for name in [DEFAULT] if name in distributions] if names is None else names
    versions: list[tuple[str, str]] = []
    entries: set[Path] = set()
    for name in wanted:
        if name not in distributions:
            raise ValueError(
                f"`package` {name}: no installed package provides it; install it first, and give "
                "the name that programs import"
            )
        distribution = distributions[name][0]
        versions.append((name, importlib.metadata.version(distribution)))
        _collect(distribution, entries, set())
    return Packages(tuple(sorted(set(versions))), tuple(sorted(entries)), names is not None)


def _collect(distribution: str, entries: set[Path], seen: set[str]) -> None:
    """Add the entries of a distribution, and of those that it requires and that are installed."""
    key = re.sub(r"[-_.]+", "-", distribution).lower()
    if key in seen:
        return
    seen.add(key)
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return  # for another machine, or optional
    tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
    folder = Path(str(found.locate_file("")))
    entries.update(path for top in tops if (path := folder / top).exists())
    for requirement in found.requires or ():
        if "extra ==" not in requirement:
            name = re.match(r"[\w.-]+", requirement)
            if name is not None:
                _collect(name[0], entries, seen)
