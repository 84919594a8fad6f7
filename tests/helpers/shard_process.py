"""Starts real shard processes, and ends them by their process id."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from lorax_contract.config import ShardConfig


class ShardProcess:
    """One ``lorax-shard serve`` that says when it is ready; use it as a context.

    ``prefix`` is put before the command line, and ``variables`` into the environment.
    """

    def __init__(
        self,
        folder: Path,
        model_dir: Path,
        *,
        launcher_gone: bool = False,
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.uri = f"unix:{folder}/shard-0"
        self.log_path = folder / "shard.log"
        ready, ready_fd = os.pipe()
        values = {
            "shard_uris": [self.uri],
            "model_id": "tiny",
            "num_threads": 1,
            "linear_backend": "torch",
            **settings,
        }
        config = ShardConfig(model_dir=str(model_dir), ready_fd=ready_fd, lifeline=True, **values)
        config_path = folder / "shard.json"
        config_path.write_text(config.to_json())
        command = [sys.executable, "-m", "lorax_shard.cli", "serve", "--config", str(config_path)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *command],
                env={**os.environ, **(variables or {})},
                stdin=subprocess.DEVNULL if launcher_gone else subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[ready_fd],
            )
        os.close(ready_fd)
        # Ends with the process, so that a failed start does not wait for ever.
        with os.fdopen(ready) as pipe:
            line = pipe.readline()
        self.facts: dict[str, Any] | None = json.loads(line) if line else None

    def __enter__(self) -> Self:
        assert self.facts is not None, self.log_path.read_text()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.wait()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Return the exit code."""
        code = self.process.wait(timeout_s)
        if self.process.stdin is not None:
            self.process.stdin.close()
        return code

    def log(self) -> list[dict[str, Any]]:
        """Return the log so far, a document a line."""
        lines = self.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]
