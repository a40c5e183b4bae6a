"""Whether this machine can isolate programs, for the tests that run some."""

import pytest

from data_pipeline.sandbox.sandbox import Limits, SandboxPair

try:
    SandboxPair(Limits()).close()
    NO_SANDBOX = ""
except ValueError as error:
    NO_SANDBOX = str(error)

needs_sandbox = pytest.mark.skipif(bool(NO_SANDBOX), reason=NO_SANDBOX or "there is one")
