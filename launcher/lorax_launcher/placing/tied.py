"""Becomes another program that ends with whoever started it: ``python -m … PARENT PROGRAM …``."""

from __future__ import annotations

import os
import sys

from lorax_contract.confine import end_with_parent

_MODULE = "lorax_launcher.placing.tied"


def tied(words: list[str]) -> list[str]:
    """Return a command line of a program that the kernel ends with this process.

    More precisely with the thread that starts it; its own children notice that it is gone.
    """
    return [sys.executable, "-m", _MODULE, str(os.getpid()), *words]


def main() -> None:
    """Become the program; if the parent is gone already, end."""
    end_with_parent()
    parent, *words = sys.argv[1:]
    if os.getppid() != int(parent):
        sys.exit(1)
    os.execvp(words[0], words)  # noqa: S606  what was started is the program itself


if __name__ == "__main__":
    main()
