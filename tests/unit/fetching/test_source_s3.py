"""S3, against a local server: prefixes below the roots, resuming, replaced objects, words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.helpers.adapter_folders import WANTED, WEIGHTS, adapter_files
from tests.helpers.s3_server import credentials, endpoint
from tests.unit.fetching.conftest import make_context

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_shard.fetching.sources.interface import FetchContext, SourceSettings
from lorax_shard.fetching.sources.s3 import S3Source

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")

__all__ = ["credentials", "endpoint"]

REF = AdapterRef.of("s3", "s3://shelf/team/poet")


@pytest.fixture
def bucket(endpoint: str) -> Any:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="shelf")
    for name, data in adapter_files(num_floats=3 << 18).items():
        client.put_object(Bucket="shelf", Key=f"team/poet/{name}", Body=data)
    client.put_object(Bucket="shelf", Key="team/poet/checkpoint-1/other", Body=b"x")
    return client


@pytest.fixture
def into(tmp_path: Path) -> Path:
    (tmp_path / "into").mkdir()
    return tmp_path / "into"


def source(endpoint: str, *roots: str, offline: bool = False) -> S3Source:
    settings = SourceSettings(s3_roots=roots, s3_endpoint=endpoint, offline=offline)
    return S3Source(settings)


@pytest.mark.parametrize("id", ["s3://shelf/team/poet", "shelf/team/poet", "s3://shelf/team/poet/"])
def test_a_prefix_is_fetched(
    bucket: Any, endpoint: str, into: Path, context: FetchContext, id: str
) -> None:
    ref = AdapterRef.of("s3", id)
    s3 = source(endpoint, "s3://shelf/team")
    s3.fetch(ref, s3.resolve(ref, None, context), into, context)
    assert {path.name for path in into.iterdir()} == WANTED
    assert (into / WEIGHTS).read_bytes() == adapter_files(num_floats=3 << 18)[WEIGHTS]


@pytest.mark.parametrize(
    ("roots", "id", "inside"),
    [
        (["s3://shelf/team"], "s3://shelf/team/poet", True),
        (["s3://shelf"], "s3://shelf/team/poet", True),
        (["s3://"], "s3://shelf/team/poet", True),
        (["s3://shelf/te"], "s3://shelf/team/poet", False),
        (["s3://other"], "s3://shelf/team/poet", False),
        (["s3://shelf/team"], "s3://shelf/team/../poet", False),
        (["s3://shelf"], "s3://shelf/", False),
        (["s3://shelf"], "s3://", False),
        ([], "s3://shelf/team/poet", False),
    ],
)
def test_only_below_the_roots(
    bucket: Any, endpoint: str, context: FetchContext, roots: list[str], id: str, inside: bool
) -> None:
    s3 = source(endpoint, *roots)
    if inside:
        assert s3.resolve(AdapterRef.of("s3", id), None, context).files
        return
    with pytest.raises(AdapterUnavailableError) as caught:
        s3.resolve(AdapterRef.of("s3", id), None, context)
    assert caught.value.reason is Reason.REFUSED


def test_a_broken_off_download_is_resumed(
    bucket: Any, endpoint: str, into: Path, context: FetchContext
) -> None:
    data = adapter_files(num_floats=3 << 18)[WEIGHTS]
    (into / f"{WEIGHTS}.part").write_bytes(data[: 2 << 20])
    arrived: list[int] = []
    context.on_bytes = arrived.append
    s3 = source(endpoint, "s3://shelf")
    s3.fetch(REF, s3.resolve(REF, None, context), into, context)
    assert (into / WEIGHTS).read_bytes() == data
    assert sum(arrived) < len(data)


def test_the_version_follows_the_objects_and_a_replaced_one_ends_the_fetch(
    bucket: Any, endpoint: str, into: Path, context: FetchContext
) -> None:
    s3 = source(endpoint, "s3://shelf")
    before = s3.resolve(REF, None, context)
    assert s3.resolve(REF, None, context) == before
    bucket.put_object(Bucket="shelf", Key=f"team/poet/{WEIGHTS}", Body=b"new")
    assert s3.resolve(REF, None, context).version != before.version
    with pytest.raises(AdapterUnavailableError, match="replaced") as caught:
        s3.fetch(REF, before, into, context)
    assert caught.value.reason is Reason.TRANSIENT


@pytest.mark.parametrize("id", ["s3://shelf/nothing", "s3://no-such-bucket/x"])
def test_what_is_not_there_is_not_found(
    bucket: Any, endpoint: str, context: FetchContext, id: str
) -> None:
    with pytest.raises(AdapterUnavailableError) as caught:
        source(endpoint, "s3://").resolve(AdapterRef.of("s3", id), None, context)
    assert caught.value.reason is Reason.NOT_FOUND


def test_an_object_over_its_limit_is_not_fetched(bucket: Any, endpoint: str, into: Path) -> None:
    s3, context = source(endpoint, "s3://shelf"), make_context(max_file_bytes=1 << 20)
    with pytest.raises(AdapterUnavailableError) as caught:
        s3.fetch(REF, s3.resolve(REF, None, context), into, context)
    assert caught.value.reason is Reason.TOO_LARGE


def test_a_server_that_is_not_there_is_trouble_that_may_pass() -> None:
    with pytest.raises(AdapterUnavailableError) as caught:
        source("http://127.0.0.1:9", "s3://").resolve(REF, None, make_context())
    assert caught.value.reason is Reason.TRANSIENT


def test_offline_asks_nobody(context: FetchContext) -> None:
    with pytest.raises(AdapterUnavailableError) as caught:
        source("http://127.0.0.1:9", "s3://", offline=True).resolve(REF, None, context)
    assert caught.value.reason is Reason.OFFLINE
