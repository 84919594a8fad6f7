"""What is done to groups so that those are there that are wanted."""

from __future__ import annotations

import pytest

from lorax_launcher.placing.steps import GroupView, Steps, next_steps
from lorax_launcher.placing.values import GroupState


def group(
    number: int, state: str = "ready", generation: int = 1, num_running: int = 0
) -> GroupView:
    return GroupView(
        number=number, generation=generation, state=GroupState(state), num_running=num_running
    )


@pytest.mark.parametrize(
    ("groups", "wanted", "steps"),
    [
        ([], 3, Steps(num_starts=3)),
        ([group(1), group(2, "starting")], 3, Steps(num_starts=1)),
        ([group(1), group(2, "placing")], 2, Steps()),
        # What drains is no longer one of those that are wanted.
        ([group(1), group(2, "draining")], 2, Steps(num_starts=1)),
        ([group(1, "draining")], 0, Steps()),
    ],
)
def test_what_lacks_is_started(groups: list[GroupView], wanted: int, steps: Steps) -> None:
    assert next_steps(groups, wanted, 1) == steps


@pytest.mark.parametrize(
    ("groups", "wanted", "drains"),
    [
        # What serves nobody yet, then the earlier generation, the least busy, the latest.
        ([group(1), group(2, "starting", 2), group(3)], 2, (2,)),
        ([group(1, generation=2), group(2, num_running=9)], 1, (2,)),
        ([group(1, num_running=1), group(2, num_running=2)], 1, (1,)),
        ([group(1), group(2), group(3)], 1, (3, 2)),
        ([group(1), group(2)], 0, (2, 1)),
    ],
)
def test_what_is_too_much_is_drained(
    groups: list[GroupView], wanted: int, drains: tuple[int, ...]
) -> None:
    assert next_steps(groups, wanted, 2) == Steps(drains=drains)


def test_an_upgrade_takes_one_after_the_other() -> None:
    """At any time all but one of those that are wanted serve."""
    states = {number: group(number) for number in (1, 2, 3)}
    last, log = 3, []
    while any(each.generation == 1 for each in states.values()):
        steps = next_steps([*states.values()], 3, 2)
        for number in steps.drains:
            states[number] = group(number, "draining")
        last += steps.num_starts
        if steps.num_starts:
            states[last] = group(last, "starting", 2)
        assert sum(each.state is GroupState.READY for each in states.values()) >= 2
        assert next_steps([*states.values()], 3, 2).drains == ()
        log.append(steps)
        if steps == Steps():
            # What was under way is over.
            states = {
                number: group(number, "ready", each.generation) for number, each in states.items()
                if each.state is not GroupState.DRAINING
            }  # fmt: skip
    assert sorted(states) == [4, 5, 6]
    assert [steps.drains for steps in log if steps.drains] == [(3,), (2,), (1,)]


def test_a_group_that_does_not_start_gives_way_to_an_upgrade() -> None:
    assert next_steps([group(1), group(2, "starting")], 2, 2) == Steps(drains=(2,))
