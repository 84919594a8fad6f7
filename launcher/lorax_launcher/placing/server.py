"""The server of a group: a launcher as a child of the group's actor."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.error import URLError

from lorax_launcher.elsewhere import RANKS_VARIABLE, RanksElsewhere
from lorax_launcher.placing.programs import ChildProgram
from lorax_launcher.placing.stores import store_folder
from lorax_launcher.placing.values import GroupLoad, GroupReport, GroupSpec, GroupState

_LAUNCHER = "lorax_launcher.cli"
_LOOPBACK = "127.0.0.1"
# Between two looks at how much it has to do, and how long one may take.
_LOOK_S, _TIMEOUT_S = 1.0, 3.0
# Gives the ranks' places, and where they meet; raises RankFault.
FindRanks = Callable[[], Awaitable[tuple[RanksElsewhere, str]]]
_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)


class RankFault(Exception):
    """A rank's machine cannot serve; the text says why."""


class GroupServer:
    """One server with its own store of adapters, from its start to its end.

    Args:
        spec: what it is started with.
        node: the machine that it is on, as Ray calls it.
        host: that machine's address.
        find_ranks: finds where its ranks are, where they have machines of their own.
    """

    def __init__(
        self, spec: GroupSpec, node: str, host: str, find_ranks: FindRanks | None = None
    ) -> None:
        self._spec = spec
        self._find_ranks = find_ranks
        self._host = link_host(spec, host)
        self.report = GroupReport(state=GroupState.STARTING, spec=spec, node=node, host=host)
        self._program: ChildProgram | None = None
        if not self._host:
            self._end(
                f"{host} is another machine than the ingress', {spec.ingress_host}: links between "
                "machines need --tls-dir"
            )

    async def run(self) -> None:
        """Run it to its end."""
        if self.report.state is GroupState.ENDED:
            return
        with store_folder(Path(self._spec.store_dir).expanduser()) as folder:
            options = server_options(self._spec, self._host, folder)
            variables: dict[str, str] = {}
            if self._find_ranks is not None:
                try:
                    placed, meeting = await self._find_ranks()
                except RankFault as error:
                    self._end(str(error))
                    return
                options, variables = rank_options(options, placed, meeting, folder)
            self._program = ChildProgram(_LAUNCHER, options, self._take, variables)
            if self.report.state is GroupState.DRAINING:
                self._program.end()
            looking = asyncio.create_task(self._look())
            try:
                code = await self._program.run()
            finally:
                looking.cancel()
        self._end(self._program.wrong or f"lorax-launcher ended with {code}")

    def drain(self) -> None:
        """Finish what it has, and end."""
        if self.report.state is GroupState.ENDED:
            return
        self.report = replace(self.report, state=GroupState.DRAINING)
        if self._program is not None:
            self._program.end()

    def _end(self, error: str) -> None:
        self.report = replace(self.report, state=GroupState.ENDED, error=error)

    def _take(self, record: Mapping[str, Any]) -> None:
        """Learn where it is from what it says."""
        if "uri" in record and "port" in record:
            self.report = replace(self.report, uri=f"{self._host}:{record['port']}")
        elif record.get("event") == "ready" and "metrics" in record:
            is_new = self.report.state is GroupState.STARTING
            state = GroupState.READY if is_new else self.report.state
            self.report = replace(
                self.report, state=state, url=str(record["url"]), metrics=str(record["metrics"])
            )

    async def _look(self) -> None:
        """Keep its load known."""
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.report.metrics:
                try:
                    text = await asyncio.to_thread(_read, self.report.metrics)
                except (URLError, OSError):
                    # It is busy or ends: what was known stays.
                    continue
                self.report = replace(self.report, load=load_in(text))


def link_host(spec: GroupSpec, host: str) -> str:
    """Return the address at which an ingress attaches; empty: links there would need certificates."""
    if spec.tls_dir is not None:
        return host
    is_here = host == spec.ingress_host or ip_address(host).is_loopback
    return _LOOPBACK if is_here else ""


def server_options(spec: GroupSpec, host: str, store: Path) -> list[str]:
    """Return the launcher's options: where nobody but the ingress has to reach it, any free port.

    What an operator gives comes last, and wins.
    """
    own = ["--json-output", "--hostname", _LOOPBACK, "--port", "0", "--metrics-port", "0"]
    link = ["--ingress-uri", f"[{host}]:0" if ":" in host else f"{host}:0"]
    if spec.tls_dir is not None:
        link += ["--ingress-tls-dir", spec.tls_dir]
    return [*own, *link, "--adapter-store-dir", str(store / "adapters"), *spec.options]


def rank_options(
    options: list[str], placed: RanksElsewhere, meeting: str, folder: Path
) -> tuple[list[str], dict[str, str]]:
    """Return options and variables of a launcher whose ranks are on several machines."""
    path = folder / "ranks.json"
    path.write_text(placed.text)
    host, _, port = meeting.rpartition(":")
    variables = {RANKS_VARIABLE: str(path)}
    if ip_address(host.strip("[]")).is_loopback:
        # The machine's name may lead nowhere, as in containers.
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    own = ["--num-shard", str(len(placed.uris)), "--master-addr", host, "--master-port", port]
    return [*own, *options], variables


def load_in(text: str) -> GroupLoad:
    """Return the load that metrics tell, as Prometheus reads them."""
    values = {name: float(value) for name, value in _SAMPLE.findall(text)}
    return GroupLoad(
        num_running=int(values.get("lorax_requests_running", 0)),
        num_queued=int(values.get("lorax_queue_length", 0)),
        kv_in_use=values.get("lorax_kv_usage_ratio", 0.0),
    )


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310  the server's own
        return str(answer.read().decode())
