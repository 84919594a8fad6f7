"""Runs a client's program in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from tests.acceptance.environments import environment, run_program
from tests.acceptance.harness import Result

# Each program and what it needs.
PROGRAMS = {
    "anthropic_sdk": ("anthropic",),
    "openai_sdk": ("openai",),
    "openai_responses": ("openai",),
}
BOUND_S = 600.0


async def run_client(name: str, url: str, model: str, adapter: str) -> Result:
    """Return how many checks of a program went well; prints what did not."""
    program = Path(__file__).with_name(f"{name}.py")
    with environment(*PROGRAMS[name]) as programs:
        command = [str(programs / "python"), str(program), url, model, adapter]
        code, output = await run_program(*command, timeout_s=BOUND_S)
    if code:
        print(output[-8000:])
    num_ok = sum(line.startswith("ok: ") for line in output.splitlines())
    return Result(code == 0, f"{num_ok} checks of {name}")
