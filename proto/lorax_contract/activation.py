"""Where in a prompt an adapter begins to act that is invoked (aLoRA)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

# A start that no token reaches.
NEVER = 2**31 - 1

_ID_BYTES = 4


def activation_start(prompt_ids: Sequence[int], invocation_ids: Sequence[int]) -> int:
    """Return the position from which on an adapter acts: the last invocation's first token.

    As in PEFT: NEVER without an invocation in the prompt, whatever the output says; 0 for an
    adapter that needs none.
    """
    if not invocation_ids:
        return 0
    prompt = array("I", prompt_ids).tobytes()
    wanted = array("I", invocation_ids).tobytes()
    place = prompt.rfind(wanted)
    while place >= 0 and place % _ID_BYTES:
        # Equal bytes across the borders of ids.
        place = prompt.rfind(wanted, 0, place + len(wanted) - 1)
    return place // _ID_BYTES if place >= 0 else NEVER
