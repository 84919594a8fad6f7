"""What has to be done to the groups that there are, so that those are there that are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorax_launcher.placing.values import GroupState


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupView:
    """What matters of a group for what is done next."""

    # Counts up: a group that came later has a larger one.
    number: int
    generation: int
    state: GroupState
    num_running: int = 0


@dataclass(frozen=True, slots=True)
class Steps:
    """What is to be done now."""

    # Groups to start, and those to drain, by their numbers.
    num_starts: int = 0
    drains: tuple[int, ...] = ()


def next_steps(groups: Sequence[GroupView], wanted: int, generation: int) -> Steps:
    """Return what is to be done now; nothing where all is as wanted, or on its way to it.

    What lacks is started, what is too much is drained: what serves nobody yet first, then what is of
    an earlier generation, then what has least to do. A group of an earlier generation is
    drained while all that are wanted serve and none is on its way out, one after the other; its successor is what lacks then.
    """
    staying = [each for each in groups if each.state is not GroupState.DRAINING]
    if len(staying) < wanted:
        return Steps(num_starts=wanted - len(staying))
    if len(staying) > wanted:
        leaving = sorted(staying, key=_worth)[: len(staying) - wanted]
        return Steps(drains=tuple(each.number for each in leaving))
    old = [each for each in staying if each.generation < generation]
    all_serve = all(each.state is GroupState.READY for each in groups)
    # What does not serve need not be waited for.
    useless = [each.number for each in old if each.state is not GroupState.READY]
    if useless:
        return Steps(drains=tuple(useless))
    return Steps(drains=(min(old, key=_worth).number,)) if old and all_serve else Steps()


def _worth(group: GroupView) -> tuple[bool, int, int, int]:
    """Order groups by how little is lost with them."""
    return group.state is GroupState.READY, group.generation, group.num_running, -group.number
