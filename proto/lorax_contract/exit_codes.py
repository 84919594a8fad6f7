"""Exit codes of the three programs, with a hint for each.

Ranges: 1-9 any program, 10-29 launcher, 30-59 shard, 60-79 router.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Why a process ended."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    BAD_CONFIG = 3
    PARENT_GONE = 4
    CHILD_DIED = 10
    CHILD_NOT_READY = 11
    INTERRUPTED = 12
    PORT_IN_USE = 13
    MODEL_NOT_FOUND = 30
    MODEL_UNSUPPORTED = 31
    MODEL_CORRUPT = 32
    MODEL_MISMATCH = 33
    OUT_OF_MEMORY = 34
    BACKEND_UNAVAILABLE = 35
    SOCKET_FAILED = 36
    DISK_FULL = 37
    RANKS_APART = 38
    DEVICE_BROKEN = 39
    FOLDER_UNUSABLE = 40
    SHARD_UNREACHABLE = 60
    TOKENIZER_UNUSABLE = 61
    ADAPTER_UNUSABLE = 62


_HINTS = {
    ExitCode.OK: "",
    ExitCode.INTERNAL: "This is a bug: please report it with the log above.",
    ExitCode.USAGE: "See --help for the options.",
    ExitCode.BAD_CONFIG: "The configuration document of a child process is not valid; "
    "start it through lorax-launcher, or compare it with lorax_contract/config.py.",
    ExitCode.PARENT_GONE: "The launcher ended; its children end with it.",
    ExitCode.CHILD_DIED: "A child process ended by itself; its last log lines say why.",
    ExitCode.CHILD_NOT_READY: "A child process did not become ready; look at its last log lines.",
    ExitCode.INTERRUPTED: "Stopped by a signal before it was ready.",
    ExitCode.PORT_IN_USE: "Choose another --port, or stop the program that listens there.",
    ExitCode.MODEL_NOT_FOUND: "Check --model-id: a folder, a .gguf file, or a hub id that this "
    "machine can reach.",
    ExitCode.MODEL_UNSUPPORTED: "See docs/models.md for the families that are served.",
    ExitCode.MODEL_CORRUPT: "Fetch the model again; a file is cut short or damaged.",
    ExitCode.MODEL_MISMATCH: "The load-time probe found other logits than transformers computes; "
    "this model cannot be served exactly.",
    ExitCode.OUT_OF_MEMORY: "Lower --max-batch-prefill-tokens, --max-total-tokens or the memory "
    "fractions, or use a smaller model.",
    ExitCode.BACKEND_UNAVAILABLE: "Choose another backend, or 'auto'.",
    ExitCode.SOCKET_FAILED: "Check --shard-uds-path: the folder must exist and be writable.",
    ExitCode.DISK_FULL: "Free space in the cache folder, or point LORAX_CACHE elsewhere.",
    ExitCode.FOLDER_UNUSABLE: "Let this user write to the folder that is named, or name another one.",
    ExitCode.RANKS_APART: "The ranks of a group lost each other, or never met: look at the log of the "
    "rank that is named; --shard-timeout is how long they wait, --master-addr and --master-port "
    "are where they meet.",
    ExitCode.DEVICE_BROKEN: "The device computes nothing any more, not even for a request of one token; "
    "start again. If that does not help, look at the device: dmesg, nvidia-smi.",
    ExitCode.SHARD_UNREACHABLE: "The router could not reach a shard; look at the shard's log.",
    ExitCode.TOKENIZER_UNUSABLE: "The model folder needs a tokenizer.json that loads.",
    ExitCode.ADAPTER_UNUSABLE: "Check --adapter-id and --preloaded-adapter-ids, their sources, and "
    "the roots from which adapters may come.",
}


def hint(code: int) -> str:
    """What to do about an exit code; empty for codes that are not ours."""
    try:
        return _HINTS[ExitCode(code)]
    except ValueError:
        return ""
