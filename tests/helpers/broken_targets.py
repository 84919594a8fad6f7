"""Targets of a fuzzer whose readers do what no reader may."""

from __future__ import annotations

import logging
import os
import random
import time
from typing import Any

from tests.fuzz.targets.target import Case, Target, require_words


class Faithful(Target):
    """Takes what is even, and refuses the rest in words."""

    name = "faithful"
    num_per_opening = 10

    def __init__(self) -> None:
        self.mutators = {"more": lambda draw, content: content + draw.randint(1, 9)}
        self.num_open, self.num_opened = 0, 0

    def open(self) -> None:
        self.num_open += 1
        self.num_opened += 1

    def close(self) -> None:
        self.num_open -= 1

    def plain(self, draw: random.Random) -> Any:
        return 2 * draw.randint(0, 9)

    def judge(self, case: Case) -> str:
        return "refused" if case.content % 2 else "taken"


class Leaking(Faithful):
    """Lets an error through."""

    def judge(self, case: Case) -> str:
        return {0: "taken"}[case.content % 2]


class Silent(Faithful):
    """Refuses without a word."""

    def judge(self, case: Case) -> str:
        if case.content % 2:
            require_words(" ")
        return "taken"


class Logging(Faithful):
    """Logs an error, and says nothing."""

    def judge(self, case: Case) -> str:
        if case.content % 2:
            logging.getLogger("reader").error("this was not thought of")
        return "taken"


class Computing(Faithful):
    """Computes too long."""

    most_cpu_s = 0.2

    def judge(self, case: Case) -> str:
        if case.content % 2:
            begun = time.process_time()
            while time.process_time() < begun + 0.3:
                pass
        return "taken"


class Picky(Faithful):
    """Refuses what everybody sends."""

    def judge(self, case: Case) -> str:
        return "refused"


class Ending(Faithful):
    """Takes its process along."""

    def judge(self, case: Case) -> str:
        if case.content % 2:
            os._exit(7)
        return "taken"


class Hanging(Faithful):
    """Does not come back."""

    def judge(self, case: Case) -> str:
        if case.content % 2:
            time.sleep(600)
        return "taken"
