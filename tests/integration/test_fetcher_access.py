"""Who gets an adapter: tokens, acceptances, failures remembered, secrets kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.helpers.adapter_folders import WEIGHTS
from tests.helpers.fetchers import POET, Clock, add, failure, fetcher, hub, importable_verifiers
from tests.helpers.hub_stub import StubHub
from tests.helpers.in_loop import in_loop

from lorax_contract.adapters import Reason
from lorax_shard.fetching.limits import ProcessLimits
from lorax_shard.fetching.negative import NegativeSettings

# Fixtures of every test here.
__all__ = ["hub", "importable_verifiers"]


@in_loop
async def test_the_fetch_is_another_process_that_gives_way_and_knows_no_token(
    hub: StubHub, tmp_path: Path
) -> None:
    hub.private["org/poet"] = "hf_of_the_caller"
    async with fetcher(hub, tmp_path, server_token="hf_of_the_server") as made:
        with await made.fetch(POET, "hf_of_the_caller") as fetched:
            facts = fetched.facts
        child = facts["parent"]
        assert len({facts["pid"], child, os.getpid()}) == 3
        # As far as Linux lets it, however much this process gives way already.
        assert facts["nice"] == min(os.nice(0) + ProcessLimits().nice, 19)
        # Neither the caller's nor the environment's: not in arguments, not in the environment.
        assert facts["tokens_around"] == []
        for kind in ("cmdline", "environ"):
            assert b"hf_" not in Path(f"/proc/{child}/{kind}").read_bytes()
        assert os.getpgid(child) == child != os.getpgrp()


@in_loop
async def test_a_private_adapter_is_for_callers_whom_the_hub_lets_in(
    hub: StubHub, tmp_path: Path
) -> None:
    hub.private["org/poet"] = "hf_member"
    async with fetcher(hub, tmp_path) as made:
        with await made.fetch(POET, "hf_member") as first:
            assert first.access == "token"
        assert (await failure(made, POET)).reason is Reason.NOT_FOUND
        assert (await failure(made, POET, "hf_stranger")).reason is Reason.NO_ACCESS
        # The hub is asked each time, nothing is fetched.
        hub.requests.clear()
        with await made.fetch(POET, "hf_member") as later:
            assert not later.downloaded
        assert hub.requests != []
        assert hub.downloads() == []
        # The hub's mind has changed.
        hub.private["org/poet"] = "hf_other"
        assert (await failure(made, POET, "hf_member")).reason is Reason.NO_ACCESS


@in_loop
async def test_an_outage_lets_nobody_in_to_what_needs_a_token(hub: StubHub, tmp_path: Path) -> None:
    hub.private["org/poet"] = "hf_member"
    async with fetcher(hub, tmp_path) as made:
        (await made.fetch(POET, "hf_member")).release()
        hub.failing_with = 503
        for token in (None, "hf_stranger", "hf_member"):
            assert (await failure(made, POET, token)).reason is Reason.TRANSIENT


@in_loop
async def test_what_is_wrong_with_a_public_adapter_is_found_out_once(
    hub: StubHub, tmp_path: Path
) -> None:
    bad = add(hub, "bad", "refuse")
    async with fetcher(hub, tmp_path) as made:
        for token in (None, "hf_a", "hf_b"):
            assert (await failure(made, bad, token)).reason is Reason.REFUSED
        assert hub.downloads().count(WEIGHTS) == 1
        # Somebody repaired it and says so.
        add(hub, "bad", "pass")
        (await made.fetch(bad, refresh=True)).release()
        (await made.fetch(bad)).release()


@in_loop
async def test_an_anonymous_failure_is_not_a_members(hub: StubHub, tmp_path: Path) -> None:
    hub.private["org/poet"] = "hf_member"
    async with fetcher(hub, tmp_path) as made:
        assert (await failure(made, POET)).reason is Reason.NOT_FOUND
        (await made.fetch(POET, "hf_member")).release()


@in_loop
async def test_a_failure_that_may_pass_is_tried_again_soon(hub: StubHub, tmp_path: Path) -> None:
    clock = Clock()
    rules = NegativeSettings(passing_first_s=1.0)
    async with fetcher(hub, tmp_path, clock, negative=rules) as made:
        hub.failing_with = 503
        error = await failure(made, POET)
        assert error.reason is Reason.TRANSIENT
        hub.failing_with = None
        assert (await failure(made, POET)).text == error.text
        clock.now += 1.0
        (await made.fetch(POET)).release()


@pytest.mark.parametrize("token", ["a b", "a\nb", "ü", "x" * 5000, "\x00"])
@in_loop
async def test_tokens_that_cannot_be_sent_are_refused(
    hub: StubHub, tmp_path: Path, token: str
) -> None:
    async with fetcher(hub, tmp_path) as made:
        error = await failure(made, POET, token)
        assert error.reason is Reason.REFUSED
        assert token not in error.text
        assert hub.requests == []
