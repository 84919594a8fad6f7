"""The shard's end of the pipe to the fetcher's child process: start it, ask it, end it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.fetching.process import Setup
from lorax_shard.fetching.redact import without_secrets

logger = logging.getLogger(__name__)

_MODULE = "lorax_shard.fetching.process"
_MAX_LINE_BYTES = 8 << 20
_START_S = 60.0
_ERROR_LINES = 20
# The child ends a fetch at its deadline; this much later the child itself counts as hung.
_BACKSTOP_S = 30.0
# What the child gets of the environment: ways and certificates, no tokens and no keys.
_PASSED = (
    "PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONPATH",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_USER_AGENT_ORIGIN",
)  # fmt: skip
_THREAD_COUNTS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS",
)  # fmt: skip

# All memory in one heap of large pages, where the system has them: a fork copies the table
# of pages, which takes longer than anything else that a small adapter's fetch does.
_HEAP = {"PYTHONMALLOC": "malloc", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

Tell = Callable[[Mapping[str, Any]], None]


class ChildLost(Exception):
    """The child process ended before it answered."""


class FetchChild:
    """One running child process and the questions under way."""

    def __init__(self, process: asyncio.subprocess.Process, secrets: tuple[str, ...]) -> None:
        self._process = process
        self._secrets = secrets
        self._jobs: dict[int, tuple[asyncio.Future[Mapping[str, Any]], Tell]] = {}
        self._next_job = 1
        self._errors: deque[str] = deque(maxlen=_ERROR_LINES)
        self._reader: asyncio.Task[None] | None = None
        self._listener = asyncio.create_task(self._listen(), name="fetcher errors")
        self.is_lost = False

    @classmethod
    async def start(cls, setup: Setup) -> FetchChild:
        """Start the process and wait until it is ready; AdapterUnavailableError if it is not."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", _MODULE,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(with_s3=bool(setup.sources.s3_roots)),
            # A group of its own: ending the group ends every fetch.
            start_new_session=True,
            limit=_MAX_LINE_BYTES,
        )  # fmt: skip
        token = setup.sources.server_token
        child = cls(process, (token,) if token else ())
        try:
            async with asyncio.timeout(_START_S):
                await child._write({"setup": setup.to_json()})
                assert process.stdout is not None
                if b"ready" not in await process.stdout.readline():
                    raise ChildLost("it ended while starting")
        except (ChildLost, TimeoutError) as error:
            await child.end()
            raise AdapterUnavailableError(
                Reason.CRASHED,
                "the process that fetches adapters does not start",
                detail="\n".join(child._errors) or str(error),
            ) from error
        except BaseException:
            await child.end()
            raise
        child._reader = asyncio.create_task(child._read(), name="fetcher answers")
        return child

    @property
    def pid(self) -> int:
        """The process' id, which is its group's too."""
        return self._process.pid

    async def ask(self, command: Mapping[str, Any], tell: Tell, backstop_s: float) -> Any:
        """Return the last message about one fetch; raises ChildLost.

        Cancelling ends the fetch. A child that is silent for ``backstop_s`` hangs: it is ended.
        """
        if self.is_lost:
            raise ChildLost
        job, self._next_job = self._next_job, self._next_job + 1
        answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()
        self._jobs[job] = answer, tell
        try:
            async with asyncio.timeout(backstop_s):
                await self._write({**command, "job": job})
                return await answer
        except TimeoutError as error:
            self._kill()
            raise ChildLost from error
        except asyncio.CancelledError:
            with contextlib.suppress(ChildLost):
                await self._write({"cancel": job})
            raise
        finally:
            self._jobs.pop(job, None)

    async def end(self) -> None:
        """End the process and every fetch."""
        self._kill()
        await self._process.wait()
        if self._reader is not None:
            await self._reader
        await self._listener

    def _kill(self) -> None:
        self.is_lost = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _write(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChildLost from error

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while line := await self._process.stdout.readline():
                self._hear(json.loads(line))
        except ValueError:
            logger.warning("the process that fetches adapters answers out of order")
        finally:
            # Fetches outlive a watcher that was killed: nobody would hear them.
            self._kill()
            for answer, _ in self._jobs.values():
                if not answer.done():
                    answer.set_exception(ChildLost())

    def _hear(self, message: Mapping[str, Any]) -> None:
        answer, tell = self._jobs.get(message["job"], (None, None))
        if answer is None or tell is None or answer.done():
            return
        if "outcome" in message or "error" in message:
            answer.set_result(message)
        else:
            tell(message)

    async def _listen(self) -> None:
        assert self._process.stderr is not None
        try:
            while line := await self._process.stderr.readline():
                text = without_secrets(line.decode(errors="replace").rstrip(), self._secrets)
                self._errors.append(text)
                logger.debug("fetcher: %s", text)
        except ValueError:
            # A line without end: what follows is of no use, and must not fill the pipe.
            while await self._process.stderr.read(_MAX_LINE_BYTES):
                pass


class RestartedChild:
    """The child process that runs: started when it is needed, and again when it died."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._child: FetchChild | None = None
        self._lock = asyncio.Lock()
        self._early: asyncio.Task[None] | None = None
        self._closed = False

    def start(self) -> None:
        """Start the process in the background, so that the first question finds it running."""
        if self._early is None and not self._closed:
            self._early = asyncio.create_task(self._start_early(), name="fetcher start")

    async def ask(self, ref: AdapterRef, token: str | None, tell: Tell) -> Mapping[str, Any]:
        """Return the last message about one fetch; of a child that dies, the next one is asked."""
        command = {"ref": dataclasses.asdict(ref), "token": token}
        backstop_s = self._setup.process.deadline_s + _BACKSTOP_S
        for _ in range(2):
            try:
                child = await self._running()
                message: Mapping[str, Any] = await child.ask(command, tell, backstop_s)
                return message
            except ChildLost:
                logger.warning("the process that fetches adapters ended; it is started again")
            except AdapterUnavailableError as error:
                return {"error": error.to_json()}
        lost = AdapterUnavailableError(
            Reason.CRASHED, f"adapter {ref}: the process that fetches adapters ended twice"
        )
        return {"error": lost.to_json()}

    async def close(self) -> None:
        """End the process for good."""
        self._closed = True
        if self._early is not None:
            self._early.cancel()
            await asyncio.gather(self._early, return_exceptions=True)
        async with self._lock:
            if self._child is not None:
                await self._child.end()
                self._child = None

    async def _start_early(self) -> None:
        try:
            await self._running()
        except (AdapterUnavailableError, OSError) as error:
            logger.warning("%s; the next fetch tries again", error)

    async def _running(self) -> FetchChild:
        async with self._lock:
            if self._child is not None and self._child.is_lost:
                await self._child.end()
                self._child = None
            if self._closed:
                raise AdapterUnavailableError(Reason.TRANSIENT, "the server is shutting down")
            if self._child is None:
                self._child = await FetchChild.start(self._setup)
            return self._child


def environment(*, with_s3: bool) -> dict[str, str]:
    """Return the child's environment: what is named above, and boto3's own if S3 is on."""
    passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
    passed |= {name: value for name, value in os.environ.items() if name.startswith("LC_")}
    if with_s3:
        passed |= {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    # One thread each: the cores are the model's.
    one = dict.fromkeys(_THREAD_COUNTS, "1")
    return {
        **passed,
        **one,
        **_HEAP,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
