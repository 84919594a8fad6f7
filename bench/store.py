"""What the adapter store costs with few entries and with many, side by side.

``cold_fetch_ms``: a small local adapter from its folder into a store that is full, so that
others give way to it; asked for at the fetcher, whose processes do it.
``cold_fetch_cpu_ms``: what its processes computed meanwhile.
``known_fetch_ms``: one that is in the store already, asked for again.
``page_ms``: the bytes of ten entries, as a page of the adapters' list asks for them.
``start_ms``: putting a store right when the fetcher starts, which looks at every name once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from lorax_contract.adapters import AdapterRef
from lorax_shard.fetching.client import AdapterFetcher, FetchSettings
from lorax_shard.fetching.process import Setup
from lorax_shard.fetching.sources.interface import SourceSettings
from lorax_shard.store.index import IndexRow
from lorax_shard.store.store import AdapterStore

FEW, MANY = 10, 100_000
# Of each entry that is made up, and of each adapter that is fetched: it takes the place of some.
ENTRY_BYTES, WEIGHTS_BYTES = 20_000, 60_000
NUM_FETCHES, NUM_PAGES, PAGE = 30, 200, 10
_MOST_LINKS = 30_000


def digest_of(number: int) -> str:
    """Return the name of a made-up entry."""
    return f"{number:064x}"


def fill(store: AdapterStore, number: int) -> None:
    """Add entries that are counted and have a name each; what lies there is never read."""
    entries = store.root / "entries"
    for each in range(number):
        # Links to few files are made faster than folders; a file takes only so many.
        first = each - each % _MOST_LINKS
        if each == first:
            (entries / digest_of(each)).touch()
        else:
            os.link(entries / digest_of(first), entries / digest_of(each))
    store.index.put_all(IndexRow(digest_of(each), ENTRY_BYTES, 1.0, each) for each in range(number))


def write_adapters(root: Path, number: int) -> None:
    """Write folders that a source takes for adapters."""
    for each in range(number):
        folder = root / f"adapter-{each}"
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "number": each}))
        (folder / "adapter_model.safetensors").write_bytes(os.urandom(WEIGHTS_BYTES))


@dataclass
class Measured:
    """One store and its fetcher, and what was measured on them."""

    store: AdapterStore
    fetcher: AdapterFetcher
    besides: frozenset[int]
    """Processes of others below this one, which may end at any time."""
    seconds: dict[str, list[float]] = field(default_factory=dict)

    async def fetch(self, kind: str, number: int) -> None:
        """Fetch an adapter and note what it took."""
        computed, began = cpu_s(self.besides), perf_counter()
        (await self.fetcher.fetch(AdapterRef.of("local", f"adapter-{number}"))).release()
        self.note(f"{kind}_ms", perf_counter() - began)
        self.note(f"{kind}_cpu_ms", cpu_s(self.besides) - computed)

    async def page(self, wanted: list[str]) -> None:
        """Ask for the bytes of some entries, in a thread as the shard's server does."""
        began = perf_counter()
        found = await asyncio.to_thread(self.store.index.sizes, wanted)
        self.note("page_ms", perf_counter() - began)
        assert len(found) == len(wanted)

    def note(self, kind: str, seconds: float) -> None:
        """Keep a figure."""
        self.seconds.setdefault(kind, []).append(seconds)


def cpu_s(besides: frozenset[int]) -> float:
    """Return what the processes of fetches have computed: descendants without ``besides``."""
    ticks = os.sysconf("SC_CLK_TCK")
    return (
        sum(seconds for number, seconds in descendants().items() if number not in besides) / ticks
    )


def descendants() -> dict[int, int]:
    """Return the ticks that each process below this one has computed, with its ended children."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:15]))
    below = {}
    for number, (parent, computed) in found.items():
        ancestor, seen = parent, 0
        while ancestor not in (0, 1, os.getpid()) and seen < 8:
            ancestor, seen = found.get(ancestor, (0, 0))[0], seen + 1
        if ancestor == os.getpid():
            below[number] = computed
    return below


@contextmanager
def measured(root: Path, folder: Path, number: int) -> Iterator[Measured]:
    """Give a full store of ``number`` entries with a fetcher."""
    store = AdapterStore(folder, max_bytes=number * ENTRY_BYTES)
    fill(store, number)
    setup = Setup(
        store_dir=str(folder),
        store_max_bytes=number * ENTRY_BYTES,
        sources=SourceSettings(local_roots=(str(root),), hub_enabled=False),
    )
    fetcher = AdapterFetcher(FetchSettings(setup=setup))
    made = Measured(store, fetcher, frozenset(descendants()))
    store.open()
    began = perf_counter()
    store.sweep()
    made.note("start_ms", perf_counter() - began)
    yield made
    store.index.close()


async def run(few: Measured, many: Measured) -> None:
    """Measure both by turns, so that both see what else the machine does."""
    both = (few, many)
    try:
        for each in both:
            await each.fetch("first", 0)
            # It started the processes.
            each.seconds = {"start_ms": each.seconds["start_ms"]}
        for number in range(1, NUM_FETCHES + 1):
            for each in both:
                await each.fetch("cold_fetch", number)
        for _ in range(NUM_FETCHES):
            for each in both:
                await each.fetch("known_fetch", NUM_FETCHES)
        digests = [sorted(each.store.index.digests()) for each in both]
        for _ in range(NUM_PAGES):
            for each, known in zip(both, digests, strict=True):
                await each.page(random.sample(known, min(PAGE, len(known))))
    finally:
        for each in both:
            await each.fetcher.close()


def figures(few: int = FEW, many: int = MANY) -> dict[str, tuple[float, float]]:
    """Return the milliseconds of each kind with few and with many entries."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as held:
        root = Path(scratch, "adapters")
        write_adapters(root, NUM_FETCHES + 1)
        both = [
            held.enter_context(measured(root, Path(scratch, f"store-{number}"), number))
            for number in (few, many)
        ]
        asyncio.run(run(*both))
    less, more = (each.seconds for each in both)
    return {kind: (1e3 * usual(kind, less[kind]), 1e3 * usual(kind, more[kind])) for kind in less}


def usual(kind: str, seconds: list[float]) -> float:
    """Return the median, or the mean of what the kernel counts in ticks."""
    return statistics.fmean(seconds) if "cpu" in kind else statistics.median(seconds)


def main() -> None:
    """Print the figures as a table, and as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=MANY, help="how many are many")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    found = figures(many=arguments.entries)
    print(f"{'':<20} {f'{FEW:,} entries':>18} {f'{arguments.entries:,} entries':>18} {'ratio':>7}")
    for kind, (less, more) in found.items():
        print(f"{kind:<20} {less:>18.2f} {more:>18.2f} {more / max(less, 1e-9):>7.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
