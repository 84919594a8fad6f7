"""The demo adapters by name."""

from __future__ import annotations

from pathlib import Path

from examples.demo import json_only, pirate, sentiment
from examples.demo.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (json_only.TASK, sentiment.TASK, pirate.TASK)}
ADAPTERS = Path(__file__).parents[1] / "adapters"
