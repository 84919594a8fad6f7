"""Base models from S3, against a local server: places, resuming, replaced models, words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.helpers.s3_server import credentials, endpoint

from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_shard.fetching.sources import objects
from lorax_shard.fetching.sources.interface import FetchContext, FetchLimits
from lorax_shard.prepare.prepare import PreparedModel, prepare
from lorax_shard.prepare.s3 import fetch_model, place_of

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")

__all__ = ["credentials", "endpoint"]

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": save({"a": torch.arange(1 << 20, dtype=torch.float32)}),
}
UNWANTED = {"pytorch_model.bin": b"\x80", "consolidated.safetensors": b"x", "run.py": b"x"}
# Of somebody's cache that was copied to the bucket as it was.
MARKER = {"complete.json": b'{"files": {}}'}


@pytest.fixture
def bucket(endpoint: str) -> Any:
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="models")
    for name, data in {**FILES, **UNWANTED, **MARKER}.items():
        client.put_object(Bucket="models", Key=f"team/base/{name}", Body=data)
    client.put_object(Bucket="models", Key="team/base/onnx/model.safetensors", Body=b"x")
    return client


def prepared(model_id: str, endpoint: str, tmp_path: Path, **options: Any) -> PreparedModel:
    defaults: dict[str, Any] = {
        "revision": None, "source": "s3", "cache_dir": tmp_path / "cache",
        "trust_remote_code": False, "progress": lambda event: None, "s3_endpoint": endpoint,
    }  # fmt: skip
    return prepare(model_id, **{**defaults, **options})


def refusal(model_id: str, endpoint: str, tmp_path: Path, **options: Any) -> StartupError:
    with pytest.raises(StartupError) as caught:
        prepared(model_id, endpoint, tmp_path, **options)
    return caught.value


def is_served_from(folder: Path) -> bool:
    wanted = all((folder / name).read_bytes() == data for name, data in FILES.items())
    return wanted and not any((folder / name).exists() for name in (*UNWANTED, "onnx"))


def test_a_model_is_fetched_once_and_served_from_the_cache(
    bucket: Any, endpoint: str, tmp_path: Path
) -> None:
    events: list[Any] = []
    model = prepared("s3://models/team/base", endpoint, tmp_path, progress=events.append)
    assert model.model_id == "s3://models/team/base"
    assert model.tokenizer_dir == model.model_dir
    assert is_served_from(model.model_dir)
    assert events[-1].done == events[-1].total == sum(map(len, FILES.values()))
    events.clear()
    again = prepared("s3://models/team/base/", endpoint, tmp_path, progress=events.append)
    assert again.model_dir == model.model_dir
    assert events == []


STEPS = {
    "modules.json": b"[]",
    "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": save({"linear.weight": torch.ones(2, 2)}),
}


def test_the_folders_of_a_models_steps_come_with_it(
    bucket: Any, endpoint: str, tmp_path: Path
) -> None:
    others = {"2_Dense/model.bin": b"x", "2_Dense/more/config.json": b"x", "openvino/a.json": b"x"}
    for name, data in {**STEPS, **others}.items():
        bucket.put_object(Bucket="models", Key=f"team/base/{name}", Body=data)
    folder = prepared("s3://models/team/base", endpoint, tmp_path).model_dir
    assert is_served_from(folder)
    assert all((folder / name).read_bytes() == data for name, data in STEPS.items())
    assert not any((folder / name).exists() for name in (*others, "onnx", "openvino"))
    # What a step says is part of what makes the model another one.
    changed = STEPS["1_Pooling/config.json"].replace(b"true", b"false")
    bucket.put_object(Bucket="models", Key="team/base/1_Pooling/config.json", Body=changed)
    again = prepared("s3://models/team/base", endpoint, tmp_path).model_dir
    assert again != folder
    assert (again / "1_Pooling/config.json").read_bytes() == changed
    # One that was damaged in the cache is fetched again.
    (again / "1_Pooling/config.json").write_bytes(b"{}" * 13)
    prepared("s3://models/team/base", endpoint, tmp_path)
    assert (again / "1_Pooling/config.json").read_bytes() == changed


def test_weights_of_a_step_are_no_models(bucket: Any, endpoint: str, tmp_path: Path) -> None:
    for name, data in STEPS.items():
        bucket.put_object(Bucket="models", Key=f"steps/{name}", Body=data)
    error = refusal("s3://models/steps", endpoint, tmp_path)
    assert error.exit_code is ExitCode.MODEL_NOT_FOUND
    assert "no safetensors directly below" in str(error)


@pytest.mark.parametrize(
    ("model_id", "environment", "place"),
    [
        ("s3://models/team/base", {}, ("models", "team/base")),
        ("models/team/base", {}, ("models", "team/base")),
        ("base", {"PREDIBASE_MODEL_BUCKET": "models"}, ("models", "base")),
        ("base", {"HF_MODEL_BUCKET": "models"}, ("models", "base")),
        (
            "base",
            {"PREDIBASE_MODEL_BUCKET": "models", "PREDIBASE_MODEL_FOLDER": "team/"},
            ("models", "team/base"),
        ),
        ("s3://other/base", {"PREDIBASE_MODEL_BUCKET": "models"}, ("other", "base")),
    ],
)
def test_a_place_is_spelled_as_in_lorax(
    model_id: str, environment: dict[str, str], place: tuple[str, str]
) -> None:
    assert place_of(model_id, environment) == place


@pytest.mark.parametrize("model_id", ["base", "s3://models", "s3:///x", "s3://models/a/../b", "/"])
def test_what_is_no_place_is_refused_in_words(endpoint: str, tmp_path: Path, model_id: str) -> None:
    error = refusal(model_id, endpoint, tmp_path)
    assert error.exit_code is ExitCode.MODEL_NOT_FOUND
    assert "s3://bucket/prefix" in str(error)


def test_a_download_that_another_process_left_is_resumed(
    bucket: Any, endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = RuntimeError("ended in the middle of a file")
    whole = objects._chunks

    def cut_short(what: str, body: Any) -> Any:
        for number, chunk in enumerate(whole(what, body)):
            if number == 2:
                raise broken
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(objects, "_chunks", cut_short)
        with pytest.raises(RuntimeError, match="in the middle"):
            prepared("s3://models/team/base", endpoint, tmp_path)
    assert not [path for path in (tmp_path / "cache" / "models").glob("s3-*") if path.is_dir()]
    opened: list[int] = []

    def counted(what: str, body: Any) -> Any:
        for chunk in whole(what, body):
            opened.append(len(chunk))
            yield chunk

    monkeypatch.setattr(objects, "_chunks", counted)
    folder = fetch_model(
        "s3://models/team/base", endpoint, tmp_path / "cache", False, lambda event: None
    )
    assert is_served_from(folder)
    assert 0 < sum(opened) <= len(FILES["model.safetensors"]) - (2 << 20) + 1000


def test_a_replaced_model_is_fetched_anew(bucket: Any, endpoint: str, tmp_path: Path) -> None:
    before = prepared("s3://models/team/base", endpoint, tmp_path)
    bucket.put_object(Bucket="models", Key="team/base/config.json", Body=b'{"model_type": "gpt2"}')
    after = prepared("s3://models/team/base", endpoint, tmp_path)
    assert after.model_dir != before.model_dir
    assert (after.model_dir / "config.json").read_bytes() == b'{"model_type": "gpt2"}'


def test_pickles_alone_are_refused_before_anything_is_fetched(
    bucket: Any, endpoint: str, tmp_path: Path
) -> None:
    bucket.put_object(Bucket="models", Key="old/base/pytorch_model.bin", Body=b"\x80")
    error = refusal("s3://models/old/base", endpoint, tmp_path)
    assert "no safetensors" in str(error)
    assert "pytorch_model.bin" in str(error)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("model_id", "words"),
    [("s3://models/nothing", "nothing below"), ("s3://no-such-bucket/x", "is not in S3")],
)
def test_what_is_not_there(
    bucket: Any, endpoint: str, tmp_path: Path, model_id: str, words: str
) -> None:
    error = refusal(model_id, endpoint, tmp_path)
    assert error.exit_code is ExitCode.MODEL_NOT_FOUND
    assert words in str(error)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    context = FetchContext(limits=FetchLimits(attempts=2), deadline=math.inf, pause=lambda _: None)
    with pytest.raises(StartupError, match="could not be reached"):
        fetch_model(
            "s3://models/x", "http://127.0.0.1:9", tmp_path, False, lambda event: None, context
        )


def test_prefixes_have_no_revisions(endpoint: str, tmp_path: Path) -> None:
    error = refusal("s3://models/team/base", endpoint, tmp_path, revision="main")
    assert error.exit_code is ExitCode.USAGE
