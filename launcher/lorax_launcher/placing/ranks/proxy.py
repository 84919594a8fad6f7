"""Stands for a rank of another machine beside the launcher: reports and ends as that does.

``python -m … ADDRESS NAMESPACE ACTOR serve --config PATH``, the last three words as ``lorax-shard``
has them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from lorax_contract.exit_codes import ExitCode
from lorax_contract.process import announce_ready, watch_lifeline
from lorax_launcher.placing.ranks.host import RankNews

# What a shard is told by its environment, as the launcher sets it.
_PREFIXES = ("GLOO_", "NCCL_", "HF_", "HUGGING_FACE_", "LORAX_CACHE", "AWS_")
_TIMEOUT_S = 30.0


def main() -> None:
    """Run the rank to its end; exit as it does."""
    address, namespace, name, *_, path = sys.argv[1:]
    ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level="error")
    try:
        code = _run(ray.get_actor(name), Path(path).read_text())
    except (RayError, ValueError) as error:
        text = f"the machine of {name} is lost: {str(error).strip().splitlines()[-1]}"
        _say(json.dumps({"ts": 0, "level": "error", "logger": __name__, "message": text}))
        code = int(ExitCode.RANKS_APART)
    # Ray's threads are not waited for.
    os._exit(code)


def _run(actor: Any, config: str) -> int:
    variables = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
    signal.signal(signal.SIGTERM, lambda *_: actor.terminate.remote())
    watch_lifeline(lambda: _leave(actor))
    ray.get(actor.start.remote(config, variables), timeout=_TIMEOUT_S)
    ready_fd: int | None = json.loads(config)["ready_fd"]
    while True:
        news: RankNews = ray.get(actor.news.remote(), timeout=_TIMEOUT_S)
        for line in news.lines:
            _say(line)
        if news.report is not None and ready_fd is not None:
            announce_ready(ready_fd, news.report)
            ready_fd = None
        if news.code is not None:
            return news.code if news.code >= 0 else 128 - news.code


def _leave(actor: Any) -> None:
    actor.end.remote()
    os._exit(0)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  the launcher reads it


if __name__ == "__main__":
    main()
