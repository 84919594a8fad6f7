"""Runs a worker of this folder in a peer's environment: JSON lines in, JSON lines out.

    python -P main.py WORKER.py
    <- {"model": folder, "adapters": [folder, ...], ...}
    -> {"ready": true}
    <- {"requests": [{"prompt_ids": [...], "max_tokens": 16, "adapter": null}, ...]}
    -> {"answers": [{"token_ids": [...], "times_s": [...]}, ...]}

A worker is a file with ``load(work)``, which returns a function of requests that returns their
answers; times are seconds from the call. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import os
import runpy
import sys


def main() -> None:
    """Answer lines until the input ends."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    load = runpy.run_path(sys.argv[1])["load"]
    answer = load(json.loads(sys.stdin.readline()))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        print(json.dumps({"answers": answer(json.loads(line)["requests"])}), file=answers)
    # Threads that a library keeps would hold the process.
    os._exit(0)


if __name__ == "__main__":
    main()
