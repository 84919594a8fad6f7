"""Runs a client's program in an environment of its own."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.acceptance.environments import environment, run_program
from tests.acceptance.harness import Result


@dataclass(frozen=True, slots=True)
class ClientProgram:
    """What a program needs, and what else its server is started with."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()


PROGRAMS = {
    "anthropic_sdk": ClientProgram(("anthropic",)),
    "huggingface_inference": ClientProgram(("huggingface_hub",)),
    "instructor_modes": ClientProgram(("instructor",)),
    "langchain_chat": ClientProgram(("langchain-openai",)),
    "litellm_client": ClientProgram(("litellm",)),
    "lorax_calls": ClientProgram(("lorax-client==0.6.3",)),
    "openai_sdk": ClientProgram(("openai",)),
    "openai_responses": ClientProgram(("openai",)),
    # So few places that calls are refused, and tried again.
    "openai_retries": ClientProgram(("openai",), ("--max-concurrent-requests", "2")),
    "sdk_refusals": ClientProgram(("anthropic", "openai"), ("--api-key", "sk-of-clients")),
    "text_generation_calls": ClientProgram(("text-generation==0.7.0",)),
}
BOUND_S = 900.0


async def run_client(name: str, url: str, model: str, adapter: str) -> Result:
    """Return how many checks of a program beside this file went well; prints what did not."""
    program = Path(__file__).with_name(f"{name}.py")
    return await run_checks(program, PROGRAMS[name].requirements, url, model, adapter)


async def run_checks(program: Path, requirements: tuple[str, ...], *arguments: str) -> Result:
    """Return how many checks of any program went well; prints what did not."""
    # What programs check with lies here.
    settings = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    with environment(*requirements) as programs:
        command = [str(programs / "python"), str(program), *arguments]
        code, output = await run_program(*command, timeout_s=BOUND_S, env=settings)
        releases = releases_of(programs, requirements)
    if code:
        print(output[-8000:])
    num_ok = sum(line.startswith("ok: ") for line in output.splitlines())
    return Result(code == 0, f"{num_ok} checks of {program.stem} with {releases}")


def releases_of(programs: Path, requirements: tuple[str, ...]) -> str:
    """Return what an environment has of what it was made for."""
    show = [str(programs / "python"), "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(show, capture_output=True, text=True, check=True).stdout.split()
    wanted = {each.partition("==")[0].replace("_", "-").lower() for each in requirements}
    return ", ".join(
        line for line in listed if line.partition("==")[0].replace("_", "-").lower() in wanted
    )
