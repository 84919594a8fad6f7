"""What a command itself says on stdout, and nothing that libraries write there."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def own_output() -> TextIO:
    """Return stdout for the caller alone, for as long as the process lives.

    Whoever else writes there, Ray's native threads included, writes to stderr from now on.
    """
    own = sys.stdout
    # A stream that is no file has nothing that native threads could write to.
    with suppress(OSError):
        descriptor, errors = sys.stdout.fileno(), sys.stderr.fileno()
        sys.stdout.flush()
        own = os.fdopen(os.dup(descriptor), "w", encoding=sys.stdout.encoding)
        os.dup2(errors, descriptor)
    sys.stdout = sys.stderr
    return own
