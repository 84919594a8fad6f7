"""Starts the children in order, watches them, and ends them: no orphan, whatever happens.

Shards that end are started again, all of them, under the next epoch: the router keeps its
requests and goes on with those. A router that ends is started again, too, and takes the shards over.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lorax_contract.config import RouterConfig, ShardConfig
from lorax_contract.exit_codes import ExitCode, hint
from lorax_launcher.children import Child
from lorax_launcher.console import Console
from lorax_launcher.endings import Told, described
from lorax_launcher.ready import ready_lines
from lorax_launcher.resolve import LaunchPlan, PrepareReport
from lorax_launcher.restarts import SETTLED_S, Restarts
from lorax_launcher.start_times import StartTimes

T = TypeVar("T")

# Seconds that a child gets to end after SIGTERM when nothing is left to drain.
STOP_S = 20.0
# Seconds on top of the grace period, for what the router does before and after draining.
GRACE_MARGIN_S = 5.0
# Seconds to wait for the shard whose death made the router, or other shards, fail.
_BLAME_S = 2.0
# Seconds that what is left of a group of shards gets to end: other ranks may wait for the dead one.
_GROUP_STOP_S = 1.0
# Ends that follow from somebody else's.
_CONSEQUENCES = (ExitCode.SHARD_UNREACHABLE, ExitCode.RANKS_APART)


@dataclass(frozen=True, slots=True)
class Programs:
    """How the children are started: the first words of their command lines."""

    shard: tuple[str, ...]
    router: tuple[str, ...]
    # What stands for ranks that run on other machines, by rank.
    elsewhere: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def _has_keys(router: RouterConfig) -> bool:
    return bool(router.api_keys_file or router.api_key_hashes or router.admin_key_hashes)


class StopRequested(Exception):
    """A signal asked the launcher to end."""


class ChildFailed(Exception):
    """A child ended, or did not start, when it should run; ``child`` is its name, if it had one."""

    def __init__(self, message: str, code: int, child: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.child = child


class Supervisor:
    """Owns the child processes of one run."""

    def __init__(
        self,
        plan: LaunchPlan,
        programs: Programs,
        console: Console,
        run_dir: Path,
        *,
        download_only: bool = False,
        times: StartTimes | None = None,
    ) -> None:
        self._plan = plan
        self._programs = programs
        self._console = console
        self._run_dir = run_dir
        self._download_only = download_only
        self._times = times or StartTimes()
        self._shards: list[Child] = []
        self._router: Child | None = None
        self._preparing: Child | None = None
        self._is_ready = False
        # What the router reported, and the ports that it has.
        self._facts: dict[str, Any] = {}
        self._ports: dict[str, Any] = {}
        # What shards that were ready once need not find out again.
        self._probed: dict[str, dict[str, Any]] = {}
        # Starts of shards or router so far, and how many of them in a series of ends.
        self._epoch = 0
        self._restarts = Restarts(plan.restarts)
        # Why the shards that end now were killed here.
        self._reason_to_kill: str | None = None
        self._stop = asyncio.Event()
        self._urgent = asyncio.Event()
        self._last_errors: dict[str, str] = {}
        # The last line of each child that is no log record: what a library says as it aborts.
        self._last_words: dict[str, str] = {}

    async def run(self) -> int:
        """Serve until a signal or a failure; return the exit code of the launcher."""
        self._watch_signals()
        try:
            await self._start()
            return ExitCode.OK
        except StopRequested:
            self._console.info("stopping")
            code = ExitCode.OK if self._is_ready else ExitCode.INTERRUPTED
            await self._stop_in_order(self._plan.router.grace_period_s + GRACE_MARGIN_S)
            self._console.info("stopped")
            return code
        except ChildFailed as failure:
            await self._stop_in_order(STOP_S)
            self._console.error(str(failure), exit_code=failure.code)
            return failure.code
        finally:
            # Reached with children alive only if the code above is wrong.
            await self._end(self._children(), 0.0)

    def request_stop(self, signum: int = signal.SIGTERM) -> None:
        """End the run; a second SIGINT ends it without any grace."""
        if self._stop.is_set() and signum == signal.SIGINT:
            self._urgent.set()
        self._stop.set()

    def _watch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(signum, self.request_stop, signum)

    async def _start(self) -> None:
        self._console.phase("preparing the model")
        model = await self._prepare()
        if self._download_only:
            self._console.info(f"{model.model_id} is prepared", folder=model.model_dir)
            return
        plan = self._plan.with_model(model)
        self._console.phase(f"loading {model.model_id}")
        await self._start_missing(plan)
        self._is_ready = True
        router, facts = self._plan.router, self._facts
        url = str(facts.get("url") or f"http://{router.hostname}:{router.port}")
        admin = [str(address) for address in facts.get("admin") or ()]
        lines = ready_lines(
            url,
            model.model_id,
            origins=router.cors_allow_origin,
            admin=admin,
            has_keys=_has_keys(router),
            metrics=facts.get("metrics"),
            tasks=facts.get("tasks") or ("generate",),
        )
        start = self._times.report()
        self._console.info(f"started in {start['total_s']:.1f} s", event="start_times", start=start)
        self._console.say(lines, event="ready", url=url, admin=admin, start=start)
        await self._keep_serving(plan)

    async def _keep_serving(self, plan: LaunchPlan) -> None:
        """Until a signal, or an end too many: what ends before is started again."""
        pause_s: float | None = None
        while True:
            try:
                if pause_s is not None:
                    await self._restart(plan, pause_s)
                await self._or_stop(asyncio.Event().wait())
            except ChildFailed as error:
                failure = error
            # Not within: what this raises is the end.
            pause_s = self._pause_before_restart(failure)

    def _pause_before_restart(self, failure: ChildFailed) -> float:
        """Say what ended; return the seconds to wait, or raise the failure if it is one too many."""
        pause_s = self._restarts.next_pause_s()
        if pause_s is None:
            raise failure if not self._restarts.limit else self._one_too_many(failure)
        who, meanwhile = self._to_restart()
        number, limit = self._restarts.number, self._restarts.limit
        self._console.error(
            f"{failure} {who} again ({number} of {limit}); {meanwhile}.",
            event="restart", epoch=self._epoch + 1, child=failure.child, code=failure.code,
            number=number, limit=limit, pause_s=pause_s,
        )  # fmt: skip
        return pause_s

    async def _restart(self, plan: LaunchPlan, pause_s: float) -> None:
        """Start again what does not serve any more, after a pause."""
        router_stays = self._router is not None and self._router.serves
        if self._router is not None and not router_stays:
            router, self._router = self._router, None
            await self._end([router], _GROUP_STOP_S)
        if not self._shards_serve:
            shards, self._shards = self._shards, []
            await self._end(shards, _GROUP_STOP_S)
        await self._or_stop(asyncio.sleep(pause_s))
        await self._start_missing(plan)
        if not router_stays:
            self._restarts.ready()
        # Else they serve once the router says so: they are not warm yet.
        self._console.info("all processes are ready again", event="restarted", epoch=self._epoch)

    @property
    def _shards_serve(self) -> bool:
        return bool(self._shards) and all(shard.serves for shard in self._shards)

    def _to_restart(self) -> tuple[str, str]:
        """Return who starts, and what that means for others, in words."""
        if self._router is not None and self._router.serves:
            return "The shards start", "requests wait for them"
        if self._shards_serve:
            return "The router starts", "the shards keep what they have loaded"
        return "Router and shards start", "what ran has to be asked for again"

    def _one_too_many(self, failure: ChildFailed) -> ChildFailed:
        return ChildFailed(
            f"{failure} Processes were started again {self._restarts.limit} times without serving for "
            f"{SETTLED_S:g} s in between, which is as often as --restarts allows.",
            failure.code,
        )

    async def _start_missing(self, plan: LaunchPlan) -> None:
        """Start the shards and the router, where they do not serve, side by side.

        The router loads its own files meanwhile, and waits for the shards.
        """
        deadline = asyncio.get_running_loop().time() + plan.start_timeout_s
        self._epoch += 1
        started: list[Child] = []
        if not self._shards_serve:
            started += await self._start_group(plan.shards)
        if self._router is None:
            # Where it was before, whatever port that was.
            config = dataclasses.replace(plan.router, epoch=self._epoch, **self._ports)
            self._router = await self._start_router(config)
            started.append(self._router)
        for child in started:
            if child is self._router and not self._is_ready:
                self._console.phase("warming up")
            report = await self._until_ready(child, deadline)
            if child is self._router:
                self._ports = report.get("ports") or {}
                self._facts = report
            elif isinstance(used := report.get("elementwise"), str):
                # Which computes what transformers does: not to be found out again.
                self._probed[child.name] = {"was_probed": True, "elementwise_backend": used}

    async def _prepare(self) -> PrepareReport:
        def argv(descriptor: int) -> Sequence[str]:
            words = (*self._plan.prepare_args, "--result-fd", str(descriptor))
            return (*self._programs.shard, "prepare", *words)

        hidden = self._plan.withheld_from_shards
        self._preparing = await self._spawn("prepare", argv, without=hidden)
        result = await self._until_ready(self._preparing)
        try:
            model = PrepareReport(
                **{field.name: result[field.name] for field in dataclasses.fields(PrepareReport)}
            )
        except KeyError as error:
            raise ChildFailed(
                f"lorax-shard prepare reported no {error}; its version does not fit this launcher.",
                ExitCode.CHILD_NOT_READY,
            ) from error
        if await self._or_stop(self._preparing.exited, watched=()) != 0:
            await self._raise_failure(self._preparing)
        await self._preparing.close()
        self._preparing = None
        return model

    async def _start_group(self, configs: Sequence[ShardConfig]) -> list[Child]:
        """Start the shards under an epoch of their own: no call for other ones reaches them."""
        self._reason_to_kill = None
        for config in configs:
            # What an earlier one said is no reason for the end of this one.
            self._last_errors.pop(f"shard-{config.rank}", None)
            self._last_words.pop(f"shard-{config.rank}", None)
        for config in configs:
            # In a file of the ranks before, these would find those.
            is_file = config.rendezvous.startswith("file:")
            meeting = f"{config.rendezvous}-{self._epoch}" if is_file else config.rendezvous
            numbered = dataclasses.replace(
                config, epoch=self._epoch, rendezvous=meeting,
                **self._probed.get(f"shard-{config.rank}", {}),
            )  # fmt: skip
            self._shards.append(await self._start_shard(numbered))
        return self._shards

    async def _start_shard(self, config: ShardConfig) -> Child:
        def argv(descriptor: int) -> Sequence[str]:
            path = self._write_config(name, dataclasses.replace(config, ready_fd=descriptor))
            program = self._programs.elsewhere.get(config.rank, self._programs.shard)
            return (*program, "serve", "--config", path)

        name = f"shard-{config.rank}"
        variables = self._plan.shard_environments[config.rank]
        return await self._spawn(name, argv, variables, without=self._plan.withheld_from_shards)

    async def _start_router(self, config: RouterConfig) -> Child:
        def argv(descriptor: int) -> Sequence[str]:
            path = self._write_config("router", dataclasses.replace(config, ready_fd=descriptor))
            return (*self._programs.router, "--config", path)

        return await self._spawn("router", argv, without=self._plan.withheld_from_router)

    def _write_config(self, name: str, config: ShardConfig | RouterConfig) -> str:
        path = self._run_dir / f"{name}.json"
        path.write_text(config.to_json())
        return str(path)

    async def _spawn(
        self,
        name: str,
        argv: Callable[[int], Sequence[str]],
        variables: Sequence[tuple[str, str]] = (),
        *,
        without: Sequence[str] = (),
    ) -> Child:
        inherited = {name: value for name, value in os.environ.items() if name not in without}
        environment = {**inherited, **dict(self._plan.environment), **dict(variables)}
        self._times.began(name)
        try:
            return await Child.start(name, argv, on_line=self._take_line, environment=environment)
        except OSError as error:
            raise ChildFailed(
                f"{name} could not start: {error}; install lorax-py again.",
                ExitCode.CHILD_NOT_READY,
            ) from error

    def _take_line(self, name: str, line: str) -> None:
        record = self._console.child_line(name, line)
        if record is None:
            self._last_words[name] = line.strip() or self._last_words.get(name, "")
            return
        if name == "router" and record.get("event") == "shards_lost":
            # If they ended, that is known in a moment.
            asyncio.get_running_loop().call_later(
                _BLAME_S, self._end_lost, record.get("epoch"), record.get("reason")
            )
        if name == "router" and record.get("event") == "shards_back":
            self._restarts.ready()
        if record.get("level") in ("error", "critical"):
            self._last_errors[name] = record["message"]

    def _end_lost(self, epoch: object, reason: object) -> None:
        """Kill shards that run but do nothing for the router any more."""
        are_running = self._shards and all(shard.is_running for shard in self._shards)
        if epoch != self._epoch or not are_running:
            return
        self._reason_to_kill = str(reason)
        for shard in self._shards:
            shard.kill()

    async def _until_ready(self, child: Child, deadline: float | None = None) -> dict[str, Any]:
        """Wait for the child's report; raise if it, or another child, ends before, or too late."""
        others = [other for other in self._children() if other is not child]
        try:
            async with asyncio.timeout_at(deadline):
                report = await self._or_stop(child.report(), watched=others)
        except TimeoutError:
            raise ChildFailed(
                f"{child.name} was not ready within {self._plan.start_timeout_s:g} s. If it is "
                "only slow, give it more with --start-timeout; else its last log lines say where "
                "it stopped.",
                ExitCode.CHILD_NOT_READY,
                child.name,
            ) from None
        if report is None:
            await self._raise_failure(child)
        self._times.reported(child.name, report.get("parts"))
        return report

    async def _or_stop(
        self, awaitable: Awaitable[T], *, watched: Iterable[Child] | None = None
    ) -> T:
        """Await something unless a signal or the end of a watched child comes first."""
        task = asyncio.ensure_future(awaitable)
        stop = asyncio.create_task(self._stop.wait())
        children = self._children() if watched is None else list(watched)
        try:
            await asyncio.wait(
                {task, stop, *(child.exited for child in children)},
                return_when=asyncio.FIRST_COMPLETED,
            )
            if stop.done():
                raise StopRequested
            if task.done():
                return task.result()
            await self._raise_failure(next(child for child in children if not child.is_running))
        finally:
            stop.cancel()
            # The end of a child is watched by others too; only what was started here is cancelled.
            if task is not awaitable:
                task.cancel()

    async def _raise_failure(self, child: Child) -> NoReturn:
        # Pipes close a moment before the end of a process can be seen.
        await asyncio.wait({child.exited}, timeout=STOP_S)
        child = await self._culprit(child)
        if child.is_running:
            raise ChildFailed(
                f"{child.name} reported nothing when it should have become ready. "
                f"{hint(ExitCode.CHILD_NOT_READY)}",
                ExitCode.CHILD_NOT_READY,
                child.name,
            )
        status = child.exited.result()
        await child.close()
        raise ChildFailed(*self._describe(child.name, status), child.name)

    async def _culprit(self, child: Child) -> Child:
        """Return the shard whose end made the router or other shards end, or the child itself."""
        if child.is_running or child.exited.result() not in _CONSEQUENCES:
            return child
        others = {shard.exited for shard in self._shards if shard is not child}
        if others:
            await asyncio.wait(others, timeout=_BLAME_S, return_when=asyncio.FIRST_COMPLETED)
        ended = [shard for shard in self._shards if not shard.is_running]
        causes = [shard for shard in ended if shard.exited.result() not in _CONSEQUENCES]
        return next(iter([*causes, *ended]), child)

    def _describe(self, name: str, status: int) -> tuple[str, int]:
        """Say what happened and what to do, and choose the launcher's exit code."""
        reason, self._reason_to_kill = self._reason_to_kill, None
        told = Told(self._last_errors.get(name, ""), self._last_words.get(name, ""), reason)
        return described(name, status, told, was_ready=self._is_ready)

    def _children(self) -> list[Child]:
        """Return the children that were started and not yet let go."""
        return [c for c in (self._preparing, self._router, *self._shards) if c is not None]

    async def _stop_in_order(self, router_grace_s: float) -> None:
        """End the router, which finishes what it serves, and only then what it needs."""
        if self._router is not None:
            await self._end([self._router], router_grace_s)
        rest = [child for child in self._children() if child is not self._router]
        await self._end(rest, STOP_S)

    async def _end(self, children: list[Child], grace_s: float) -> None:
        """SIGTERM, wait at most ``grace_s`` seconds or until hurried, then SIGKILL."""
        running = {child.exited for child in children if child.is_running}
        if running and grace_s > 0 and not self._urgent.is_set():
            for child in children:
                child.terminate()
            all_ended = asyncio.ensure_future(asyncio.wait(running))
            hurried = asyncio.create_task(self._urgent.wait())
            await asyncio.wait(
                {all_ended, hurried}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED
            )
            hurried.cancel()
            all_ended.cancel()
        for child in children:
            child.kill()
        await asyncio.gather(*(child.exited for child in children))
        await asyncio.gather(*(child.close() for child in children))
