"""Why a child ended, in words, and what to do about it."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from lorax_contract.exit_codes import ExitCode, hint
from lorax_contract.process import says_out_of_memory
from lorax_launcher.resolve import in_flags


@dataclass(frozen=True, slots=True)
class Told:
    """What a child said before it ended, and what the launcher did to it."""

    # Its last error in the log.
    cause: str = ""
    # Its last line that is no log record: what a library says as it aborts.
    last_words: str = ""
    # Why the launcher killed it; None: it did not.
    reason_to_kill: str | None = None


def described(name: str, status: int, told: Told, *, was_ready: bool) -> tuple[str, int]:
    """Say what happened and what to do, and choose the launcher's exit code."""
    if _is_unexplained(status) and says_out_of_memory(told.last_words):
        code = ExitCode.OUT_OF_MEMORY
        return f"{name} ended for lack of memory: {told.last_words}. {hint(code)}", code
    if told.reason_to_kill is not None:
        return f"{name} was killed: {told.reason_to_kill}.", ExitCode.CHILD_DIED
    if status < 0:
        return _of_signal(name, -status, told.last_words), ExitCode.CHILD_DIED
    if was_ready:
        what = f"{name} ended by itself with exit code {status}"
        return _sentence(what, told.cause, ExitCode.CHILD_DIED), ExitCode.CHILD_DIED
    known = status in {code.value for code in ExitCode}
    if status == 0:
        code = ExitCode.CHILD_NOT_READY
    else:
        code = ExitCode(status) if known else ExitCode.CHILD_DIED
    cause = in_flags(told.cause) if code is ExitCode.BAD_CONFIG else told.cause
    return _sentence(f"{name} could not start (exit code {status})", cause, code), code


def _of_signal(name: str, number: int, last_words: str) -> str:
    what = f"{name} was killed by {_signal_name(number)}"
    if number == signal.SIGKILL:
        what += ", perhaps by the system for lack of memory"
    elif last_words:
        what += f", its last words: {last_words}"
    return f"{what}. {hint(ExitCode.CHILD_DIED)}"


def _is_unexplained(status: int) -> bool:
    """Whether a child ended otherwise than by an exit code that it chose."""
    return status == ExitCode.INTERNAL or status not in {code.value for code in ExitCode}


def _sentence(what: str, cause: str, code: ExitCode) -> str:
    told = f"{what}: {cause.rstrip('.')}." if cause else f"{what}."
    # The message of a StartupError says what to do; others, and silence, need the hint.
    explained = cause and code not in (ExitCode.INTERNAL, ExitCode.CHILD_DIED)
    return told if explained else f"{told} {hint(code)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
