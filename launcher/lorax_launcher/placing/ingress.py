"""An ingress of a service: `lorax-ingress` as a child of an actor, told by a file where groups are."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax_launcher.placing.programs import ChildProgram
from lorax_launcher.placing.values import IngressSpec

_INGRESS = "lorax_ingress.cli"
# Before it is started again.
_PAUSE_S = 1.0


class IngressKeeper:
    """Keeps an ingress running, and the file that says where its replicas are.

    Args:
        spec: what it is started with.
    """

    def __init__(self, spec: IngressSpec) -> None:
        self._spec = spec
        self._folder = tempfile.TemporaryDirectory(prefix="lorax-places-")
        self._places = Path(self._folder.name) / "places"
        self._places.touch()
        self._program: ChildProgram | None = None
        self._is_ending = False
        # Where clients ask; empty while it takes no requests.
        self.url = ""
        # Where its own metrics are, if it has a port for them.
        self.metrics = ""
        self.error = ""

    def tell(self, places: Mapping[str, str]) -> None:
        """Say where replicas are: names and addresses. The file is replaced, never half written."""
        text = "".join(f"{name}={uri}\n" for name, uri in sorted(places.items()))
        if self._places.read_text() == text:
            return
        new = self._places.with_suffix(".new")
        new.write_text(text)
        os.replace(new, self._places)

    async def run(self) -> None:
        """Run it, again when it ends, until it is told to end."""
        while not self._is_ending:
            self._program = ChildProgram(
                _INGRESS, ingress_options(self._spec, self._places), self._take
            )
            code = await self._program.run()
            self.url = self.metrics = ""
            if not self._is_ending:
                self.error = self._program.wrong or f"lorax-ingress ended with {code}"
                await asyncio.sleep(_PAUSE_S)

    def end(self) -> None:
        """Finish what it has, and end."""
        self._is_ending = True
        if self._program is not None:
            self._program.end()

    def close(self) -> None:
        """Remove the file, once it has ended."""
        self._folder.cleanup()

    def _take(self, record: Mapping[str, Any]) -> None:
        if record.get("event") == "ready":
            self.url, self.error = str(record["url"]), ""
            self.metrics = str(record.get("metrics", ""))


def ingress_options(spec: IngressSpec, places: Path) -> list[str]:
    """Return the command line of an ingress."""
    own = ["--hostname", spec.hostname, "--port", str(spec.port), "--replica", f"file:{places}"]
    if spec.tls_dir is not None:
        own += ["--tls-dir", spec.tls_dir]
    if spec.number > 1:
        # Who asks at the port that they share hears one of them: each has one of its own for metrics.
        own += ["--share-port", "--metrics-port", "0"]
    return [*own, *spec.options]
