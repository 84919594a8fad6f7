"""Names, the choice of files, announced sizes, errors without secrets."""

from __future__ import annotations

import pytest
from tests.helpers.adapter_folders import CONFIG, WANTED, WEIGHTS, adapter_files

from lorax_contract.adapters import AdapterRef, AdapterUnavailableError, Reason
from lorax_contract.errors import LoraxError
from lorax_shard.adapter_files import StoredFile, files_digest
from lorax_shard.fetching.redact import without_secrets
from lorax_shard.fetching.sources.interface import (
    FetchLimits,
    RemoteFile,
    SourceSettings,
    check_announced,
    select_files,
)

REF = AdapterRef.of("hub", "org/name")


def test_a_revision_may_be_part_of_a_hub_id() -> None:
    assert AdapterRef.of("hub", "org/name@v2") == AdapterRef.of("hub", "org/name", "v2")
    assert AdapterRef.of("hub", "org/name@v2", "v2").revision == "v2"
    assert AdapterRef.of("local", "a@b").revision is None
    with pytest.raises(AdapterUnavailableError, match="two revisions"):
        AdapterRef.of("hub", "org/name@v2", "v3")


@pytest.mark.parametrize("id", ["", "a\nb", "a\x00b", "a\x7f", "x" * 513, "name@"])
def test_ids_that_are_no_plain_text_are_refused(id: str) -> None:
    with pytest.raises(AdapterUnavailableError) as caught:
        AdapterRef.of("hub", id)
    assert caught.value.reason is Reason.REFUSED


def test_different_names_have_different_keys() -> None:
    names = [("hub", "a", None), ("hub", "a", "b"), ("local", "a", None), ("hub", "ab", None)]
    assert len({AdapterRef.of(*name).key for name in names}) == len(names)


def test_only_an_adapters_files_are_chosen() -> None:
    assert set(select_files(REF, adapter_files())) == WANTED


def test_names_of_labels_are_an_adapter_s() -> None:
    assert set(select_files(REF, [*adapter_files(), "config.json"])) == {*WANTED, "config.json"}


def test_code_that_lies_beside_an_adapter_is_never_chosen() -> None:
    code = ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "handler.py", "x.so")
    assert set(select_files(REF, [*adapter_files(), *code, "adapter_model.bin"])) == WANTED


def test_the_weights_of_mlx_are_chosen_where_there_are_no_others() -> None:
    mlx = ["adapters.safetensors", "0000100_adapters.safetensors", CONFIG, "README.md"]
    assert select_files(REF, mlx) == (CONFIG, "adapters.safetensors")
    assert select_files(REF, [*mlx, WEIGHTS]) == (CONFIG, WEIGHTS)
    assert FetchLimits().of_file("adapters.safetensors") == FetchLimits().of_file(WEIGHTS)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([WEIGHTS], "not a PEFT adapter"),
        ([CONFIG, "adapters.npz"], "save it as adapters.safetensors"),
        ([CONFIG], f"no {WEIGHTS}"),
        ([CONFIG, "adapter_model.bin"], "pickle"),
        ([CONFIG, "adapter_model.pt"], "pickle"),
        ([], "not a PEFT adapter"),
    ],
)
def test_what_is_no_adapter_is_refused_in_words(names: list[str], words: str) -> None:
    with pytest.raises(AdapterUnavailableError, match=words) as caught:
        select_files(REF, names)
    assert caught.value.reason is Reason.REFUSED
    assert "org/name" in caught.value.text


@pytest.mark.parametrize(
    ("files", "passes"),
    [
        ({WEIGHTS: 100, CONFIG: 10}, True),
        ({WEIGHTS: 101}, False),
        ({CONFIG: 11}, False),
        ({WEIGHTS: 100, CONFIG: 10, "tokenizer.json": 10}, False),
        ({WEIGHTS: None}, True),
    ],
)
def test_announced_sizes_are_checked_before_a_byte_is_fetched(
    files: dict[str, int | None], passes: bool
) -> None:
    limits = FetchLimits(max_file_bytes=100, max_small_file_bytes=10, max_total_bytes=110)
    announced = [RemoteFile(name=name, size=size) for name, size in files.items()]
    if passes:
        assert check_announced(REF, announced, limits) == sum(size or 0 for size in files.values())
    else:
        with pytest.raises(AdapterUnavailableError) as caught:
            check_announced(REF, announced, limits)
        assert caught.value.reason is Reason.TOO_LARGE


def test_the_digest_names_contents_not_their_order() -> None:
    one = StoredFile(name="a", size=1, sha256="00")
    two = StoredFile(name="b", size=1, sha256="11")
    assert files_digest([one, two]) == files_digest([two, one])
    assert files_digest([one]) != files_digest([one, two])
    assert files_digest([one]) != files_digest([StoredFile(name="b", size=1, sha256="00")])


def test_errors_cross_the_pipe_whole() -> None:
    for reason in Reason:
        error = AdapterUnavailableError(reason, "why", retry_after_s=3.0, detail="more")
        again = AdapterUnavailableError.from_json(error.to_json())
        assert again.to_json() == error.to_json()
        assert isinstance(again, LoraxError)
        assert again.kind.http_status == (422 if reason.permanent else 424)


def test_secrets_and_signatures_leave_texts() -> None:
    text = "GET https://me:pw@cdn.test/file?sig=abc with hf_secret failed, hf_secret again"
    clean = without_secrets(text, ["hf_secret", None, ""])
    assert clean == "GET https://cdn.test/file with *** failed, *** again"
    text = "the hub at https://me:pw@hub.test:8443 could not be reached; see http://a@b.test/c"
    clean = without_secrets(text, [])
    assert clean == "the hub at https://hub.test:8443 could not be reached; see http://b.test/c"


def test_settings_do_not_show_their_token() -> None:
    assert "hf_secret" not in repr(SourceSettings(server_token="hf_secret"))
