"""Keeps as many server groups as are wanted, and tells the ingresses where they are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Any, Protocol

from lorax_launcher.placing.autoscaler import Autoscaler
from lorax_launcher.placing.steps import GroupView, next_steps
from lorax_launcher.placing.values import GroupReport, GroupSpec, GroupState, ServiceSpec

logger = logging.getLogger(__name__)

# Between two looks.
_LOOK_S = 0.5
# After groups that never served, at first and at most.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
# A group that says nothing for so long, though its machine lives, is ended.
_SILENCE_S = 60.0


class GroupLostError(Exception):
    """A group's actor is gone, with its machine or without."""


class GroupHandle(Protocol):
    """A group somewhere in the cluster."""

    async def report(self) -> GroupReport | None:
        """Return what it says of itself; None: nothing in time. Raises GroupLostError."""

    async def drain(self) -> None:
        """Have it finish what it has and end."""

    def remove(self) -> None:
        """End it at once if it runs, and free what is kept for it."""


class GroupCluster(Protocol):
    """Where groups are placed."""

    def place(self, number: int, spec: GroupSpec) -> GroupHandle:
        """Start a group as soon as there is room."""

    def find(self) -> dict[int, GroupHandle]:
        """Return the groups that there are, by number; what is kept for others is freed."""

    def last(self) -> int:
        """Return the highest number that a group has or had, as far as that is known; 0: none."""

    async def tell_ingresses(self, places: Mapping[str, str]) -> None:
        """Say where replicas are."""


@dataclass(slots=True)
class KnownGroup:
    """A group and what was last heard of it."""

    number: int
    generation: int
    handle: GroupHandle
    heard_at: float
    report: GroupReport | None = None
    has_served: bool = False
    is_draining: bool = False

    @property
    def state(self) -> GroupState:
        """Where it is in its life."""
        if self.is_draining:
            return GroupState.DRAINING
        return GroupState.PLACING if self.report is None else self.report.state

    @property
    def view(self) -> GroupView:
        """What matters of it for what is done next."""
        load = 0 if self.report is None else self.report.load.num_running
        return GroupView(
            number=self.number, generation=self.generation, state=self.state, num_running=load
        )

    def described(self) -> dict[str, Any]:
        """Return what an operator sees of it."""
        about: dict[str, Any] = {"name": f"group-{self.number}", "state": self.state.value}
        about |= {"generation": self.generation}
        if self.report is not None:
            load, names = self.report.load, ("node", "host", "uri", "url", "metrics")
            about |= {name: getattr(self.report, name) for name in names}
            about |= {"running": load.num_running, "queued": load.num_queued, "kv": load.kv_in_use}
        return about


@dataclass(slots=True)
class Pause:
    """How long nothing is started, since what was started ended before it served."""

    until: float = 0.0
    num_failures: int = 0

    def failed(self, now: float) -> None:
        """One more failed."""
        self.num_failures += 1
        pause_s = min(_FIRST_PAUSE_S * 2 ** (self.num_failures - 1), _LONGEST_PAUSE_S)
        self.until = now + pause_s


@dataclass(slots=True)
class Controller:
    """Keeps the groups of a service.

    Args:
        cluster: where they are placed.
        service: what is wanted, until an operator wants something else.
        clock: monotonic seconds.
    """

    cluster: GroupCluster
    service: ServiceSpec
    clock: Callable[[], float] = monotonic
    autoscaler: Autoscaler = field(default_factory=Autoscaler)
    wanted: int = field(init=False)
    groups: dict[int, KnownGroup] = field(default_factory=dict)
    pause: Pause = field(default_factory=Pause)
    # What the last group that failed said.
    error: str = ""
    # The number of the group that came last: none is used twice.
    last: int = 0

    def __post_init__(self) -> None:
        self.wanted = self.service.least

    async def run(self) -> None:
        """Look and act until the task is cancelled; what fails once is tried again."""
        await self.recover()
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("the groups could not be looked after")
            await asyncio.sleep(_LOOK_S)

    async def recover(self) -> None:
        """Take on the groups of an earlier controller, with what their operator wanted last."""
        self.last = self.cluster.last()
        for number, handle in self.cluster.find().items():
            self._know(number, 0, handle)
        await self._hear()
        for each in self.groups.values():
            if each.report is not None:
                each.generation = each.report.spec.generation
                each.is_draining = each.report.state is GroupState.DRAINING
                if each.generation > self.service.group.generation:
                    self.service = replace(self.service, group=each.report.spec)
        staying = sum(not each.is_draining for each in self.groups.values())
        # A fixed number that an operator had changed is that of the groups.
        if staying and self.service.least == self.service.most:
            self.service = replace(self.service, least=staying, most=staying)
        self.wanted = max(self.service.least, min(staying, self.service.most))

    # --- what operators want ------------------------------------------------------------

    def scale(self, least: int, most: int) -> None:
        """Keep between so many replicas, which are no fewer than one."""
        if not 1 <= least <= most:
            raise ValueError(
                f"replicas are 1 or more, and at most as many as the most: {least}, {most}"
            )
        self.service = replace(self.service, least=least, most=most)
        self.wanted = min(max(self.wanted, least), most)

    def upgrade(self, options: tuple[str, ...]) -> None:
        """Replace all groups by such with other options, one after the other."""
        group = self.service.group
        new = replace(group, options=options, generation=group.generation + 1)
        self.service = replace(self.service, group=new)
        self.pause = Pause()

    def close(self) -> None:
        """Drain all groups, and free what is kept for them."""
        self.service = replace(self.service, least=0, most=0)
        self.wanted = 0

    def status(self) -> dict[str, Any]:
        """Return what an operator sees."""
        about = {"wanted": self.wanted, "least": self.service.least, "most": self.service.most}
        groups = [each.described() for _, each in sorted(self.groups.items())]
        generation = self.service.group.generation
        return {**about, "generation": generation, "groups": groups, "error": self.error}

    # --- one look -----------------------------------------------------------------------

    async def look(self) -> None:
        """Hear all groups, do what has to be done now, and tell the ingresses."""
        await self._hear()
        now = self.clock()
        loads = [
            each.report.load for each in self.groups.values()
            if each.report is not None and each.state is GroupState.READY
        ]  # fmt: skip
        bounds = self.service.least, self.service.most
        self.wanted = self.autoscaler.wanted(loads, self.wanted, bounds, now)
        await self.cluster.tell_ingresses(self._places())
        views = [each.view for each in self.groups.values()]
        steps = next_steps(views, self.wanted, self.service.group.generation)
        for number in steps.drains:
            await self._drain(self.groups[number])
        if now >= self.pause.until:
            for _ in range(steps.num_starts):
                self._start()

    def _places(self) -> dict[str, str]:
        """Return where those are that serve, or finish what they have."""
        return {
            f"group-{each.number}": each.report.uri
            for each in self.groups.values()
            if each.report is not None and each.has_served and each.report.uri
        }

    async def _hear(self) -> None:
        groups = [*self.groups.values()]
        answers = await asyncio.gather(
            *(each.handle.report() for each in groups), return_exceptions=True
        )
        for group, answer in zip(groups, answers):
            if isinstance(answer, GroupLostError):
                self._lose(group, str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                self._take(group, answer)

    def _take(self, group: KnownGroup, report: GroupReport | None) -> None:
        now = self.clock()
        if report is None:
            # What was never heard of waits for a machine.
            if group.report is not None and now - group.heard_at > _SILENCE_S:
                self._lose(group, "it says nothing")
            return
        group.heard_at, group.report = now, report
        if report.state is GroupState.READY and not group.has_served:
            group.has_served, self.pause, self.error = True, Pause(), ""
            logger.info("group %d serves at %s", group.number, report.uri)
        if report.state is GroupState.ENDED:
            self._lose(group, report.error)

    def _lose(self, group: KnownGroup, why: str) -> None:
        del self.groups[group.number]
        group.handle.remove()
        if group.is_draining:
            logger.info("group %d has ended", group.number)
            return
        logger.warning("group %d is lost: %s", group.number, why)
        self.error = why
        if not group.has_served:
            self.pause.failed(self.clock())

    def _start(self) -> None:
        number, spec = self.last + 1, self.service.group
        logger.info("group %d is started", number)
        self._know(number, spec.generation, self.cluster.place(number, spec))

    def _know(self, number: int, generation: int, handle: GroupHandle) -> None:
        self.groups[number] = KnownGroup(number, generation, handle, self.clock())
        self.last = max(self.last, number)

    async def _drain(self, group: KnownGroup) -> None:
        logger.info("group %d is drained", group.number)
        group.is_draining = True
        if group.report is None:
            self._lose(group, "")
        else:
            await group.handle.drain()
