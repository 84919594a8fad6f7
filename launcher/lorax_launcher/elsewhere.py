"""Ranks of a group on other machines: where they listen, and which programs stand for them here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorax_launcher.options import UsageError
from lorax_launcher.resolve import LaunchPlan

# A file of whoever places ranks on machines; the launcher's options know of one machine only.
RANKS_VARIABLE = "LORAX_RANKS_FILE"


@dataclass(frozen=True, slots=True, kw_only=True)
class RanksElsewhere:
    """Where the ranks of a group are."""

    # The addresses at which they listen, in their order.
    uris: tuple[str, ...]
    # What is started here in place of a rank that runs elsewhere: it reports and ends as that does.
    programs: Mapping[int, tuple[str, ...]]
    # A folder of certificates on each machine; None: all ranks are on this one.
    tls_dir: str | None = None

    @classmethod
    def read(cls, path: Path) -> RanksElsewhere:
        """Read what ``text`` wrote."""
        known = json.loads(path.read_text())
        programs = {int(rank): tuple(words) for rank, words in known["programs"].items()}
        return cls(uris=tuple(known["uris"]), programs=programs, tls_dir=known["tls_dir"])

    @property
    def text(self) -> str:
        """All of it, for a file."""
        return json.dumps(dataclasses.asdict(self))

    def spread(self, plan: LaunchPlan) -> LaunchPlan:
        """Return a plan whose ranks listen where they are; UsageError if they are not as many."""
        if len(self.uris) != len(plan.shards):
            raise UsageError(
                f"{len(self.uris)} ranks have a place and {len(plan.shards)} are asked for; "
                "--num-shard says how many."
            )
        shards = tuple(
            dataclasses.replace(shard, shard_uris=[*self.uris], shard_tls_dir=self.tls_dir)
            for shard in plan.shards
        )
        router = dataclasses.replace(
            plan.router, shard_uri=self.uris[0], shard_tls_dir=self.tls_dir
        )
        return dataclasses.replace(plan, shards=shards, router=router)
