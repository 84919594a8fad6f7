"""Settings that must stand before anything is imported."""

from __future__ import annotations

import gc
import os
import shutil

from hypothesis import HealthCheck, settings
from tests.helpers.triton_interpreter import mend_interpreter

# Triton decides at import whether its kernels are compiled for a GPU or interpreted.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    mend_interpreter()

# gRPC would start its threads again in a fork, which then fail on files that the fork closed. No
# process of the server that forks has gRPC; those of tests have.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A busy machine is no fault of the code under test.
settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """What ten thousand tests are made of stays to the end: the garbage collector need not look."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At the interpreter's end all goes."""
    gc.unfreeze()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Binary cases are named by their number: what a packer writes may hold the time of day.

    Two workers that collect in different seconds must see the same tests.
    """
    if isinstance(val, bytes) and not (val.isascii() and val.decode().isprintable()):
        return argname
    return None
