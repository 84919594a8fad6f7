"""Limited processes that ended by an error of their own code, as their owners tell it."""

from __future__ import annotations

import logging


class ProcessesLost(logging.Handler):
    """Keeps what is said of processes that ended with a code: an error was in their own code."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a word."""
        if "with code" in record.getMessage() or "with an answer" in record.getMessage():
            self.words.append(record.getMessage())
