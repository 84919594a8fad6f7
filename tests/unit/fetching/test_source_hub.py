"""The hub: which token opens what, resuming, damage, limits, and words for each failure."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers.adapter_folders import CONFIG, WANTED, WEIGHTS, adapter_files
from tests.helpers.hub_stub import COMMIT, StubHub, running_hub
from tests.unit.fetching.conftest import make_context

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.fetching.sources.hub import HubSource
from lorax_shard.fetching.sources.interface import FetchContext, SourceSettings

REF = AdapterRef.of("hub", "org/poet")
MEGABYTES = 3 << 18


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with running_hub(StubHub({"org/poet": adapter_files(num_floats=MEGABYTES)})) as running:
        yield running


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def source(hub: StubHub, **settings: object) -> HubSource:
    return HubSource(SourceSettings(hub_endpoint=hub.url, **settings))  # type: ignore[arg-type]


def fetch(hub: StubHub, into: Path, context: FetchContext, token: str | None = None) -> None:
    resolved = source(hub).resolve(REF, token, context)
    source(hub).fetch(REF, resolved, into, context)


def failure(hub: StubHub, into: Path, context: FetchContext, token: str | None = None) -> Reason:
    with pytest.raises(AdapterUnavailableError) as caught:
        fetch(hub, into, context, token)
    assert token is None or token not in f"{caught.value.text} {caught.value.detail}"
    return caught.value.reason


def test_an_adapters_files_arrive_and_no_others(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    resolved = source(hub).resolve(REF, None, context)
    assert resolved.version == COMMIT
    stored = source(hub).fetch(REF, resolved, into, context)
    assert {file.name for file in stored} == WANTED == {path.name for path in into.iterdir()}
    assert (into / WEIGHTS).read_bytes() == hub.repositories["org/poet"][WEIGHTS]
    assert set(hub.downloads()) == WANTED


def test_a_token_is_not_sent_where_none_is_needed(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    fetch(hub, into, context, token="sk-of-another-service")
    assert set(hub.tokens) == {""}


def test_a_private_adapter_opens_with_its_token_only(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    hub.private["org/poet"] = "hf_right"
    assert failure(hub, into, context) is Reason.NOT_FOUND
    assert failure(hub, into, context, token="hf_wrong") is Reason.NO_ACCESS
    resolved = source(hub).resolve(REF, "hf_right", context)
    assert resolved.access == "token"
    assert len(source(hub).fetch(REF, resolved, into, context)) == len(WANTED)


def test_the_operators_token_opens_for_everybody(hub: StubHub, context: FetchContext) -> None:
    hub.private["org/poet"] = "hf_operator"
    resolved = source(hub, server_token="hf_operator").resolve(REF, "hf_other", context)
    assert resolved.access == "server"


def test_a_gated_adapter_whose_listing_is_public_is_not_public(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    hub.gated_files["org/poet"] = "hf_member"
    assert failure(hub, into, context) is Reason.NO_ACCESS
    assert failure(hub, into, context, token="hf_stranger") is Reason.NO_ACCESS
    assert source(hub).resolve(REF, "hf_member", context).access == "token"


def test_a_redirect_to_another_host_carries_no_token(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    hub.private["org/poet"] = "hf_right"
    with running_hub(StubHub({"org/poet": hub.repositories["org/poet"]})) as storage:
        # The same machine by another name is another host.
        hub.elsewhere = storage.url.replace("127.0.0.1", "localhost")
        fetch(hub, into, context, token="hf_right")
        assert set(storage.downloads()) == WANTED
        assert set(storage.tokens) == {""}


def test_a_transfer_that_breaks_goes_on_where_it_stopped(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    hub.breaks_once.add(WEIGHTS)
    fetch(hub, into, context)
    size = len(hub.repositories["org/poet"][WEIGHTS])
    assert len(hub.ranges) == 1
    assert 1 << 20 <= int(hub.ranges[0].removeprefix("bytes=").rstrip("-")) <= size // 2 + 1
    assert (into / WEIGHTS).read_bytes() == hub.repositories["org/poet"][WEIGHTS]


@pytest.mark.parametrize("good", [True, False])
def test_bytes_kept_by_an_ended_process_are_used_if_they_are_good(
    hub: StubHub, into: Path, context: FetchContext, good: bool
) -> None:
    data = hub.repositories["org/poet"][WEIGHTS]
    kept = data[: 2 << 20] if good else bytes(2 << 20)
    (into / f"{WEIGHTS}.part").write_bytes(kept)
    fetch(hub, into, context)
    assert (into / WEIGHTS).read_bytes() == data
    assert hub.downloads().count(WEIGHTS) == (1 if good else 2)
    assert hub.ranges == [f"bytes={2 << 20}-"]


@pytest.mark.parametrize("surplus", [0, 5])
def test_a_kept_file_that_is_complete_or_too_long_is_dealt_with(
    hub: StubHub, into: Path, context: FetchContext, surplus: int
) -> None:
    data = hub.repositories["org/poet"][WEIGHTS]
    (into / f"{WEIGHTS}.part").write_bytes(data + bytes(surplus))
    fetch(hub, into, context)
    assert (into / WEIGHTS).read_bytes() == data


def test_a_whole_file_of_an_earlier_try_is_not_fetched_again(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    fetch(hub, into, context)
    fetch(hub, into, context)
    assert hub.downloads().count(WEIGHTS) == 1


def test_a_hub_in_trouble_is_asked_again(hub: StubHub, into: Path, context: FetchContext) -> None:
    hub.next_statuses = [503, 429, 200]
    hub.next_statuses.pop()
    fetch(hub, into, context)
    assert (into / WEIGHTS).exists()


@pytest.mark.parametrize("status", [500, 503, 429, 418])
def test_a_hub_that_stays_in_trouble_is_given_up_for_now(
    hub: StubHub, into: Path, context: FetchContext, status: int
) -> None:
    hub.failing_with = status
    assert failure(hub, into, context) is Reason.TRANSIENT


def test_a_hub_that_is_not_there_is_trouble_that_may_pass(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    gone = StubHub(url="http://127.0.0.1:9")
    assert failure(gone, into, context) is Reason.TRANSIENT


def test_damaged_bytes_are_noticed(hub: StubHub, into: Path, context: FetchContext) -> None:
    hub.damaged.add(WEIGHTS)
    assert failure(hub, into, context) is Reason.CORRUPT
    assert not list(into.glob(f"{WEIGHTS}*"))


@pytest.mark.parametrize("how", ["announced", "unannounced", "endless"])
def test_a_size_bomb_stops_at_the_limit(hub: StubHub, into: Path, how: str) -> None:
    if how != "announced":
        getattr(hub, how).add(WEIGHTS)
    limit = 1 << 19
    assert failure(hub, into, make_context(max_file_bytes=limit)) is Reason.TOO_LARGE
    assert sum(path.stat().st_size for path in into.iterdir()) < 4 * limit


def test_a_silent_hub_is_not_waited_for(hub: StubHub, into: Path) -> None:
    hub.held[WEIGHTS] = threading.Event()
    context = make_context(stall_timeout_s=0.1, attempts=2)
    try:
        assert failure(hub, into, context) is Reason.TRANSIENT
    finally:
        hub.held[WEIGHTS].set()


def test_a_slow_hub_runs_into_the_deadline(hub: StubHub, into: Path) -> None:
    context = make_context()
    times = iter(range(1000))
    context.now = lambda: float(next(times))
    context.deadline = 8.0
    assert failure(hub, into, context) is Reason.TRANSIENT


@pytest.mark.parametrize("id", ["org/nothing", "org/poet@nothing"])
def test_ids_that_lead_nowhere(hub: StubHub, context: FetchContext, id: str) -> None:
    with pytest.raises(AdapterUnavailableError) as caught:
        source(hub).resolve(AdapterRef.of("hub", id), None, context)
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    "id",
    [
        "../../etc", "org/..", "a/b/c", "org/poet?x=1", "http://127.0.0.1/x", "org/poet@../../x",
        "gpt 4", "127.0.0.1:8000/x", "[::1]/x", "org/poet#x", "org%2fpoet", "org\\poet",
        "me:pw@127.0.0.1/x", "//127.0.0.1/x", "org/poet@main?x=1", "org/poet@main#x", "org/.git",
        "file:///etc/passwd", "org/poet@..", "org/poet/resolve/main/x", "-org/poet",
    ],
)  # fmt: skip
def test_what_can_be_no_id_is_not_there_and_asks_nobody(
    hub: StubHub, context: FetchContext, id: str
) -> None:
    with pytest.raises(AdapterUnavailableError) as caught:
        source(hub).resolve(AdapterRef.of("hub", id), None, context)
    assert caught.value.reason is Reason.NOT_FOUND
    assert hub.requests == []


def test_offline_asks_nobody(hub: StubHub, context: FetchContext) -> None:
    with pytest.raises(AdapterUnavailableError, match="switched off") as caught:
        source(hub, offline=True).resolve(REF, None, context)
    assert caught.value.reason is Reason.OFFLINE
    assert hub.requests == []


def test_pickles_are_refused_before_a_download(
    hub: StubHub, into: Path, context: FetchContext
) -> None:
    hub.repositories["org/poet"] = {CONFIG: b"{}", "adapter_model.bin": b"x"}
    assert failure(hub, into, context) is Reason.REFUSED
    assert hub.downloads() == []
