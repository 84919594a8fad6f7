"""Plays a target's cases one after another, and says what came of them."""

from __future__ import annotations

import faulthandler
import itertools
import logging
import re
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.fuzz.targets.target import Case, FoundFaultError, Target

# By how much one case may make the process grow.
MOST_GROWN_MIB = 768.0


@dataclass(slots=True)
class Hunted:
    """What came of a target's cases."""

    name: str
    num_cases: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    mutators: Counter[str] = field(default_factory=Counter)
    # What is wrong, with the case that shows it; empty: nothing.
    finding: str = ""

    def __str__(self) -> str:
        outcomes = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        mutators = ", ".join(f"{name} {count}" for name, count in sorted(self.mutators.items()))
        rate = 60 * self.num_cases / max(self.seconds, 1e-3)
        return (
            f"{self.name}: {self.num_cases} cases in {self.seconds:.0f} s ({rate:.0f} a minute): "
            f"{outcomes}; by mutator: {mutators}"
        )


def hunt(
    target: Target,
    seed: int,
    *,
    seconds: float = float("inf"),
    numbers: range | None = None,
    tell: Callable[[int], None] = lambda _number: None,
    ends_after_s: float | None = None,
) -> Hunted:
    """Play cases until one is found fault with, the time is over, or all ``numbers`` are played.

    Args:
        tell: called with each case's number before it is played.
        ends_after_s: end this process if a case takes longer; None: it may.
    """
    hunted, begun = Hunted(target.name), time.perf_counter()
    is_open = False
    try:
        for number in numbers or itertools.count():
            if time.perf_counter() - begun > seconds:
                break
            tell(number)
            if ends_after_s is not None:
                faulthandler.dump_traceback_later(ends_after_s, exit=True)
            if is_open and number % target.num_per_opening == 0:
                is_open = False
                target.close()
            if not is_open:
                target.open()
                is_open = True
            _play(target, target.make(seed, number), hunted)
            if hunted.finding:
                hunted.finding = (
                    f"{hunted.finding}\n  replay: python -m tests.fuzz --target {target.name} "
                    f"--seed {seed} --case {number}"
                )
                break
    finally:
        if ends_after_s is not None:
            faulthandler.cancel_dump_traceback_later()
        hunted.seconds = time.perf_counter() - begun
        if is_open:
            target.close()
    return hunted


def _play(target: Target, case: Case, hunted: Hunted) -> None:
    hunted.num_cases += 1
    hunted.mutators.update(case.mutators or ["none"])
    cpu_s, grown = time.process_time(), _peak_mib()
    with _errors_logged(target.logged_errors) as logged:
        try:
            outcome = target.judge(case)
            if not case.mutators and outcome != "taken":
                raise FoundFaultError(f"what nobody changed is not taken: {outcome}")
        except FoundFaultError as error:
            hunted.finding = str(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            hunted.finding = f"{type(error).__name__} gets through:\n{_lines(error)}"
        else:
            hunted.outcomes[outcome] += 1
            cpu_s, grown = time.process_time() - cpu_s, _peak_mib() - grown
            hunted.finding = _too_much(target, cpu_s, grown)
    if logged:
        told = hunted.finding or "an error is logged"
        hunted.finding = f"{told}\n  in the log: {logged[0]}"
    if hunted.finding:
        hunted.finding = f"{target.name}: {hunted.finding}\n  by {case.mutators}: {case}"


def _too_much(target: Target, cpu_s: float, grown_mib: float) -> str:
    if cpu_s > target.most_cpu_s:
        return f"it took {cpu_s:.1f} s of computing"
    if grown_mib > MOST_GROWN_MIB:
        return f"it took {grown_mib:.0f} MiB"
    return ""


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _lines(error: BaseException) -> str:
    return "".join(traceback.format_exception(error, limit=-12))[-3_000:]


class _ErrorKeeper(logging.Handler):
    """Keeps what is logged as an error: nothing that is sent may lead to that."""

    def __init__(self, expected: tuple[str, ...]) -> None:
        super().__init__(logging.ERROR)
        self._expected = re.compile("|".join(expected) or "(?!)")
        self.found: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        if not self._expected.search(record.getMessage()):
            self.found.append(self.format(record)[-2_000:])


@contextmanager
def _errors_logged(expected: tuple[str, ...]) -> Iterator[list[str]]:
    keeper = _ErrorKeeper(expected)
    logging.getLogger().addHandler(keeper)
    try:
        yield keeper.found
    finally:
        logging.getLogger().removeHandler(keeper)
