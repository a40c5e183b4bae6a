"""The command line of bubblewrap: what a sandbox sees of this machine, and its Python."""

import os
import shutil
import stat
import sys
from pathlib import Path

from data_pipeline.sandbox.packages import NO_PACKAGES, Packages

INSTALL = (
    "install bubblewrap (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install "
    "bubblewrap) where user namespaces are allowed, or set `unsafe_no_sandbox` to run "
    "model-written code with your own rights"
)
NOBODY = 65534
PACKAGES_FOLDER = "/packages"
_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/usr/local/lib")
_LINKED = ("/lib", "/lib64", "/lib32")


def bubblewrap_command(python: str, packages: Packages = NO_PACKAGES) -> list[str]:
    """The sandbox's command line, up to and with the Python that runs in it.

    CAP_SYS_ADMIN is one over the sandbox's own namespaces, for the zygote, which gives it up in
    each child before a program runs.

    Raises:
        ValueError: bubblewrap is not installed.
    """
    program = shutil.which("bwrap")
    if program is None:
        raise ValueError(f"bwrap not found: {INSTALL}")
    command = [program, "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"]
    command += ["--new-session", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--hostname", "sandbox"]
    for folder in _LIBRARIES:
        command += ["--ro-bind-try", folder, folder]
    for folder in _LINKED:
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    prefix = _prefix(python)
    if prefix not in ("/usr", "/usr/local"):
        command += ["--ro-bind", prefix, prefix]
    real = os.path.realpath(python)
    if not real.startswith(f"{prefix}/lib/"):
        command += ["--ro-bind", real, real]
    for entry in packages.entries:
        command += ["--ro-bind", str(entry), f"{PACKAGES_FOLDER}/{entry.name}"]
    # no /proc: there is nothing to learn about any process, and nothing to write to
    command += ["--dev", "/dev", "--remount-ro", "/dev", "--dir", "/tmp", "--remount-ro", "/"]
    return [*command, "--chdir", "/", real]


def _prefix(python: str) -> str:
    """The installation that a Python belongs to: the folder above its `bin`."""
    return os.path.dirname(os.path.dirname(os.path.realpath(python)))


def find_python(for_nobody: bool) -> str:
    """A Python that the sandbox's user can read: our own, without the environment's packages.

    Args:
        for_nobody: root will start the sandbox as the user `nobody`.

    Raises:
        ValueError: there is none.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    tried = [os.path.join(sys.base_prefix, "bin", f"python{version}")]
    tried += [f"{folder}/python3" for folder in ("/usr/local/bin", "/usr/bin")]
    for python in tried:
        real = os.path.realpath(python)
        if os.path.exists(real) and (not for_nobody or _open_to_all(real)):
            return real
    raise ValueError(
        f"no Python for the sandbox: as root it runs as the user nobody, who cannot read any of "
        f"{', '.join(tried)}; run as an ordinary user, or install python3 in /usr"
    )


def _open_to_all(path: str) -> bool:
    """Whether every user can reach and execute a file."""
    parts = [Path(path), *Path(path).parents]
    return all(part.stat().st_mode & stat.S_IXOTH for part in parts)
