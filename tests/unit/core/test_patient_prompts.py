"""Prompts of classes worse than one that was seen: short steps, so that urgent ones wait little."""

from __future__ import annotations

from tests.helpers.core_world import CoreWorld

from lorax_router.core.policies.fair import FairShare
from lorax_router.core.policies.policy import SchedulingPolicy
from lorax_router.core.policies.priority import SHARE_OF_BETTER, StrictPriority
from lorax_router.core.request import RequestTerms
from lorax_router.core.step_builder import PATIENT_PART

STEP = 64
PATIENT, URGENT = RequestTerms("ant", priority=5), RequestTerms("bee", priority=0)


class World(CoreWorld):
    """Notes of each step how many tokens of whose prompts are in it."""

    def __init__(self, policy: SchedulingPolicy | None = None) -> None:
        super().__init__(
            StrictPriority() if policy is None else policy, max_rows=16, max_step_tokens=STEP
        )
        self.steps: list[dict[str, int]] = []
        plan = self.scheduler.plan

        def noting(now: float):  # type: ignore[no-untyped-def]
            made = plan(now)
            step = {"ant": 0, "bee": 0}
            if made is not None:
                assert 0 not in made.num_tokens
                for row, num in zip(made.row_ids, made.num_tokens, strict=True):
                    step[self.terms[row].tenant] += num if num > 1 else 0
            self.steps.append(step)
            return made

        self.scheduler.plan = noting  # type: ignore[method-assign]


def flooded(policy: SchedulingPolicy | None = None) -> World:
    """Return a world in which an urgent request was seen, and many patient ones wait."""
    world = World(policy)
    world.submit(URGENT, num_prompt=4, num_output=1)
    world.run_until_idle()
    world.steps.clear()
    for _ in range(20):
        world.submit(PATIENT, num_prompt=30, num_output=4)
    return world


def test_prompts_of_a_worse_class_have_a_part_of_a_step() -> None:
    world = flooded()
    world.run_until_idle()
    assert max(step["ant"] for step in world.steps) == STEP // PATIENT_PART
    assert set(world.ended) == set(world.terms)


def test_while_no_better_class_was_seen_they_have_the_whole_step() -> None:
    world = World()
    for _ in range(4):
        world.submit(PATIENT, num_prompt=30)
    world.step()
    assert world.steps[0]["ant"] > STEP // 2


def test_other_policies_know_no_classes() -> None:
    world = flooded(FairShare())
    world.step()
    assert world.steps[0]["ant"] > STEP // 2


def test_an_urgent_prompt_has_its_step_for_itself() -> None:
    world = flooded()
    world.step(4)
    world.submit(URGENT, num_prompt=40)
    world.step()
    assert world.steps[-1] == {"ant": 0, "bee": 40}


def test_under_urgent_prompts_in_each_step_patient_ones_still_have_every_other() -> None:
    world = flooded()
    for _ in range(20):
        world.submit(URGENT, num_prompt=8, num_output=1)
        world.step()
    assert [step["bee"] > 0 for step in world.steps] == [True] * 20
    pairs = zip(world.steps[::2], world.steps[1::2], strict=True)
    assert all(first["ant"] + second["ant"] > 0 for first, second in pairs)


def test_a_long_patient_prompt_has_no_more_than_others_of_its_kind() -> None:
    world = flooded()
    long = world.submit(PATIENT, num_prompt=400)
    world.run_until_idle()
    assert long in world.ended
    assert max(step["ant"] for step in world.steps) == STEP // PATIENT_PART


def test_a_turn_of_a_worse_class_is_one_request() -> None:
    """Those behind it are patient again, though nobody urgent waits any more."""
    world = flooded()
    for _ in range(SHARE_OF_BETTER):
        world.submit(URGENT, num_prompt=8, num_output=1)
    world.run_until_idle()
    assert sum(step["ant"] > STEP // PATIENT_PART for step in world.steps) <= 1


def test_a_long_patient_prompt_keeps_its_part_while_short_ones_enter_with_it() -> None:
    """It is placed behind them, and was admitted for some of what they may have."""
    world = flooded()
    world.run_until_idle()
    long = world.submit(PATIENT, num_prompt=200)
    short = [world.submit(PATIENT, num_prompt=6) for _ in range(6)]
    world.run_until_idle()
    assert {long, *short} <= world.ended.keys()
