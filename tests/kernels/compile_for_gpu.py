"""Compiles Triton kernels for GPUs that are not here, and reads what they need.

The interpreter and the compiler cannot share a process, so `resources` runs this file in a child.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import child_environment


@dataclass(frozen=True)
class Resources:
    """What ptxas and the compiler say of one kernel on one target."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    vector_loads: int
    """128-bit global loads in the PTX."""


def resources(
    module: str,
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, Any],
    *,
    capability: int,
    num_warps: int,
) -> Resources:
    """Compile `module.kernel` for sm_<capability> in a child process.

    Args:
        module: Python module of the kernel.
        kernel: its name there.
        signature: argument name to Triton's type, "*bf16", "i32", "fp32", or "constexpr".
        constants: values of the constexpr arguments; None for a pointer that is not given.
        capability: 80, 90 or 100.
        num_warps: as launched.
    """
    request = {
        "module": module,
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "capability": capability,
        "num_warps": num_warps,
    }
    environment = child_environment()
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve())],
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return Resources(**json.loads(done.stdout.splitlines()[-1]))


def _compile(request: dict[str, Any]) -> Resources:
    """Compile one kernel in this process."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(request["module"]), request["kernel"])
    signature, capability = request["signature"], request["capability"]
    # the launcher finds multiples of 16 by itself; a compiler without arguments must be told
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
        and not function.params[index].do_not_specialize
    }
    source = ASTSource(
        fn=function, signature=signature, constexprs=request["constants"], attrs=aligned
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": request["num_warps"]},
    )
    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = programs / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        suffix = "a" if capability >= 90 else ""
        report = subprocess.run(
            [str(assembler), "-v", f"-arch=sm_{capability}{suffix}", file.name, "-o", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers is not None, report
    return Resources(
        registers=int(registers.group(1)),
        spill_bytes=sum(map(int, spills.groups())) if spills is not None else 0,
        shared_bytes=compiled.metadata.shared,
        vector_loads=len(re.findall(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"])),
    )


if __name__ == "__main__":
    print(json.dumps(vars(_compile(json.load(sys.stdin)))))
