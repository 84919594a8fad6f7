"""The fuzzer finds what is wrong with a reader, says how to see it again, and finds nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.fuzz.targets import NAMES, target_of
from tests.fuzz.targets.hunt import hunt
from tests.fuzz.targets.target import Target
from tests.fuzz.targets.watched import hunt_apart
from tests.helpers import broken_targets as broken

HERE = "tests.helpers.broken_targets"


def test_a_reader_that_does_as_it_should_is_found_no_fault_with() -> None:
    target = broken.Faithful()
    hunted = hunt(target, 1, numbers=range(60))
    assert (hunted.finding, hunted.num_cases) == ("", 60)
    assert hunted.outcomes["taken"] + hunted.outcomes["refused"] == 60
    assert min(hunted.outcomes.values()) > 0
    assert hunted.mutators["more"] > 60
    assert (target.num_open, target.num_opened) == (0, 6)
    assert "by mutator: more" in str(hunted)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (broken.Leaking, "KeyError gets through"),
        (broken.Silent, "refused without a word"),
        (broken.Logging, "this was not thought of"),
        (broken.Computing, "s of computing"),
        (broken.Picky, "what nobody changed is not taken"),
    ],
)
def test_what_no_reader_may_do_is_found_and_can_be_seen_again(
    target: Callable[[], Target], words: str
) -> None:
    hunted = hunt(target(), 1, numbers=range(500))
    assert words in hunted.finding
    assert "by [" in hunted.finding
    number = int(hunted.finding.rsplit("--case ", 1)[1])
    assert hunted.num_cases == number + 1
    again = hunt(target(), 1, numbers=range(number, number + 1))
    assert words in again.finding


@pytest.mark.parametrize(("kind", "words"), [("Ending", "code 7"), ("Hanging", "code 1")])
def test_a_process_that_ends_or_hangs_is_a_finding_of_its_case(kind: str, words: str) -> None:
    hunted = hunt_apart(f"{HERE}:{kind}", 1, 60, hang_s=3.0)
    assert f"ended with {words}" in hunted.finding
    number = int(hunted.finding.rsplit("--case ", 1)[1])
    assert broken.Faithful().make(1, number).content % 2


def test_a_process_that_is_well_tells_what_it_did() -> None:
    hunted = hunt_apart(f"{HERE}:Faithful", 1, 60, range(20))
    assert (hunted.finding, hunted.num_cases) == ("", 20)


@pytest.mark.parametrize("name", NAMES)
def test_cases_are_those_of_their_seed(name: str) -> None:
    one, other = (target_of(name) for _ in range(2))
    assert one.name == name
    for number in range(5):
        assert str(one.make(3, number)) == str(other.make(3, number))
    assert len({str(one.make(seed, 0)) for seed in range(12)}) > 1


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("name", "parser"),
    [
        ("adapters", "lorax_shard.peft.read.parse_config"),
        ("shard", "lorax_shard.rpc.servicer.step_from_proto"),
        ("http", "lorax_router.service.prompts.prompt_encoder.check_chat"),
        ("grpc", "lorax_router.grpc_api.servicer.chat_prompt"),
    ],
)
def test_a_fault_that_is_planted_in_a_parser_is_found(
    name: str, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parser, raising(KeyError("planted")))
    hunted = hunt(target_of(name), 1, numbers=range(100))
    assert "planted" in hunted.finding or "internal" in hunted.finding.lower(), hunted.finding
    assert f"--target {name} --seed 1 --case" in hunted.finding
