"""An adapter's patterns, matched in a process of their own that a long match cannot outlive.

A regular expression can take for ever on a short name, and nothing in its process can stop it:
``re`` keeps the interpreter for the whole match. So what has operators is matched in a fork that
the kernel ends after a second of computing.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NoReturn

from lorax_shard.peft.base import BaseDescription
from lorax_shard.peft.config import LoraOptions
from lorax_shard.peft.errors import AdapterRefusedError
from lorax_shard.peft.targets import PLAIN, LowRank, Selection, select

logger = logging.getLogger(__name__)

# Of computing; honest patterns take milliseconds.
LIMIT_S = 1.0
# More than this many patterns could take long together, though each is plain.
_MAX_PLAIN = 500
_OPTION_BYTES = 64
_MOST_FILES = 4096


def select_in_time(
    options: LoraOptions, base: BaseDescription, limit_s: float = LIMIT_S
) -> Selection:
    """Return what ``select`` returns; AdapterRefusedError if that takes longer than the limit."""
    if _is_plain(options):
        return select(options, base)
    # Shared with the fork: which option it matches at the moment.
    place = mmap.mmap(-1, _OPTION_BYTES)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _answer_and_leave(options, base, place, writer, limit_s)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        logger.warning("the process that compared patterns ended with status %d", status)
        raise AdapterRefusedError(_obituary(place, status, limit_s))
    return _selection(json.loads(answer))


def _is_plain(options: LoraOptions) -> bool:
    patterns = list(_patterns(options))
    return len(patterns) <= _MAX_PLAIN and all(PLAIN.fullmatch(each) for each in patterns)


def _patterns(options: LoraOptions) -> Iterator[str]:
    for either in (options.target_modules, options.exclude_modules):
        if isinstance(either, str):
            yield either
    yield from options.modules_to_save
    yield from options.layers_pattern
    yield from options.rank_pattern
    yield from options.alpha_pattern


def _answer_and_leave(
    options: LoraOptions, base: BaseDescription, place: mmap.mmap, writer: int, limit_s: float
) -> NoReturn:
    """Be the fork: match, answer, end without any clean-up."""
    code = 1
    try:
        # Whoever reads from these must not wait for this process.
        os.closerange(3, writer)
        os.closerange(writer + 1, _MOST_FILES)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_VIRTUAL, limit_s)

        def note(option: str) -> None:
            place[:] = option.encode().ljust(_OPTION_BYTES, b"\0")

        try:
            document = asdict(select(options, base, note))
        except AdapterRefusedError as error:
            document = {"refused": error.public}
        with os.fdopen(writer, "wb") as file:
            file.write(json.dumps(document).encode())
        code = 0
    finally:
        os._exit(code)


def _obituary(place: mmap.mmap, status: int, limit_s: float) -> str:
    option = place[:].rstrip(b"\0").decode() or "target_modules"
    if status == -signal.SIGVTALRM:
        return (
            f"{option} of adapter_config.json has a pattern that takes more than {limit_s:g} s to "
            "compare with the names of the model's modules; list the names, or write a simpler one"
        )
    return (
        f"{option} of adapter_config.json has a pattern that cannot be compared with the names "
        "of the model's modules; list the names, or write a simpler one"
    )


def _selection(document: dict[str, Any]) -> Selection:
    if "refused" in document:
        raise AdapterRefusedError(document["refused"])
    return Selection(
        low_rank={name: LowRank(**each) for name, each in document["low_rank"].items()},
        saved=document["saved"],
        tokens={name: (tuple(ids), tied) for name, (ids, tied) in document["tokens"].items()},
        warnings=tuple(document["warnings"]),
    )
