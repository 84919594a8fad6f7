"""Two servers are restarted one after the other under load, and no request is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.helpers.round_robin import RollingRestart
from tests.helpers.server import Server

NUM_CLIENTS, NUM_TOKENS = 6, 40
PARAMETERS = {"max_new_tokens": NUM_TOKENS, "ignore_eos_token": True}
BODY = {"inputs": "the quick brown fox", "parameters": PARAMETERS}


def test_restarted_one_after_the_other_they_lose_no_request(launch: Callable[..., Server]) -> None:
    async def scene() -> RollingRestart:
        rolling = RollingRestart(launch, [BODY] * NUM_CLIENTS)
        await asyncio.wait_for(rolling.run(), 240)
        return rolling

    rolling = asyncio.run(scene())
    assert rolling.exit_codes == [0, 0]
    # Each has answered before it was restarted, and after.
    assert len(rolling.balancer.num_answers) == 4
    answers = [each for client in rolling.answers for each in client]
    assert len(answers) > 4 * NUM_CLIENTS
    texts = {tuple(event["token"]["text"] for event in each) for each in answers}
    # All are whole, and the same, whichever server gave them.
    assert len(texts) == 1
    assert {len(each) for each in answers} == {NUM_TOKENS}
    assert all(each[-1]["generated_text"] for each in answers)
