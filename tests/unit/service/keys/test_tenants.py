"""The file of keys: what it says, and how it is refused without telling a key."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from lorax_contract.config import ConfigError
from lorax_contract.errors import UnauthenticatedError
from lorax_contract.keys import hash_of
from lorax_router.service.callers import Caller, Quotas
from lorax_router.service.keys.keyring import Keyring, keys_in
from lorax_router.service.keys.store import KeyStore
from lorax_router.service.keys.tenants import parse_tenants

SECRET = "sk-acme-very-secret"
TOML = f"""
[tenants.acme]
keys = ["{SECRET}", "sha256:{hash_of("sk-acme-second")}"]
priority = -1
weight = 2.5
requests_per_minute = 60
tokens_per_minute = 10_000
fetches_per_minute = 5
store_bytes = 1_000_000
queued_requests = 40
queued_tokens = 50_000
kv_share = 0.5
adapter_share = 1
concurrent_fetches = 3
pins = 2
adapters = ["acme-*"]
api_token_env = "ACME_TOKEN"

[tenants.ops]
keys = ["sk-operators-key"]
admin = true
"""
ENVIRONMENT = {"ACME_TOKEN": "hf_of_acme"}


def test_a_file_says_whom_keys_stand_for_and_what_they_may() -> None:
    callers = parse_tenants(TOML, ENVIRONMENT)
    acme = callers[hash_of(SECRET)]
    assert acme is callers[hash_of("sk-acme-second")]
    assert acme == Caller(
        tenant="acme",
        may_read_metrics=False,
        priority=-1,
        weight=2.5,
        quotas=Quotas(
            requests_per_minute=60,
            tokens_per_minute=10_000,
            fetches_per_minute=5,
            store_bytes=1_000_000,
            queued_requests=40,
            queued_tokens=50_000,
            kv_share=0.5,
            adapter_share=1.0,
            concurrent_fetches=3,
            pins=2,
        ),
        adapters=("acme-*",),
        api_token="hf_of_acme",
    )
    ops = callers[hash_of("sk-operators-key")]
    assert (ops.is_admin, ops.may_read_metrics, ops.adapters) == (True, True, None)
    assert "hf_of_acme" not in repr(acme)


def test_json_says_the_same_as_toml() -> None:
    document = {"tenants": {"a": {"keys": [SECRET], "pins": 1, "admin": True}}}
    toml = f'[tenants.a]\nkeys = ["{SECRET}"]\npins = 1\nadmin = true\n'
    assert parse_tenants(json.dumps(document)) == parse_tenants(toml)


def bad(name: str = "a", **values: Any) -> str:
    return json.dumps({"tenants": {name: {"keys": [SECRET], **values}}})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "`tenants` is missing"),
        ("{", "not valid JSON: line 1 column 2"),
        (f"[tenants.a]\nkeys = [{SECRET}]", "not valid TOML: line 2, column"),
        (f'{{"tenants": {{"a": {{"keys": ["{SECRET}"],,}}}}}}', "not valid JSON: line 1 column"),
        ("[" * 100_000, "not valid TOML"),
        ('{"a":' * 100_000, "not valid JSON"),
        ('{"tenants": {}, "x": 1}', "unknown at the top: x"),
        ('{"tenants": {"a": []}}', "tenant a: must be a table"),
        ('{"tenants": {"a": {}}}', "tenant a: `keys` is missing or empty"),
        (bad(keys="sk-as-a-text"), "tenant a: `keys` must be a list of texts"),
        (bad(keys=["short"]), "tenant a: key 1 is too short"),
        (bad(keys=[SECRET, "with a space"]), "tenant a: key 2 has a space"),
        (bad(keys=["sha256:12"]), "tenant a: key 1 is no sha256"),
        (bad(name="a b"), "the name of a tenant"),
        (bad(name="admin"), "tenant admin: the name is that of the keys given by flags"),
        (bad(quota=3), "tenant a: unknown fields: quota"),
        (bad(pins=-1), "tenant a: `pins` must be a whole number from 0"),
        (bad(requests_per_minute=0), "tenant a: `requests_per_minute` must be a whole number"),
        (bad(tokens_per_minute=True), "tenant a: `tokens_per_minute` must be a whole number"),
        (bad(store_bytes="1GB"), "tenant a: `store_bytes` must be a whole number"),
        (bad(queued_requests=0), "tenant a: `queued_requests` must be a whole number from 1"),
        (bad(queued_tokens=1.5), "tenant a: `queued_tokens` must be a whole number from 1"),
        (bad(concurrent_fetches="2"), "tenant a: `concurrent_fetches` must be a whole number"),
        (bad(kv_share=0), "tenant a: `kv_share` must be a number above 0 and at most 1"),
        (bad(adapter_share=1.5), "tenant a: `adapter_share` must be a number above 0"),
        (bad(kv_share=True), "tenant a: `kv_share` must be a number above 0"),
        (bad(kv_share="half"), "tenant a: `kv_share` must be a number above 0"),
        (bad(admin="yes"), "tenant a: `admin` must be true or false"),
        (bad(weight=0), "tenant a: `weight` must be a number from 0.001 to 1000"),
        (bad(weight=True), "tenant a: `weight` must be a number"),
        (bad(weight="2"), "tenant a: `weight` must be a number"),
        (bad(adapters="x"), "tenant a: `adapters` must be a list"),
        (bad(api_token_env="NOT_SET"), "tenant a: `api_token_env` must name a variable"),
        (json.dumps({"tenants": {"a": {"keys": [SECRET]}, "b": {"keys": [SECRET]}}}),
         "tenants a and b share a key"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_its_place_and_never_by_a_key(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tenants(text, {})
    assert words in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_keyring_finds_whole_keys_only_and_keeps_none() -> None:
    ring = Keyring({hash_of(SECRET): Caller(tenant="a")})
    found = ring.find(SECRET)
    assert found is not None and found.tenant == "a"
    for wrong in ("", SECRET[:-1], SECRET + "x", SECRET.upper(), hash_of(SECRET), "\ud800"):
        assert ring.find(wrong) is None
    assert SECRET not in repr(vars(ring))


def test_the_first_key_that_is_known_counts() -> None:
    ring = Keyring({hash_of(SECRET): Caller(tenant="a")})
    assert ring.require(["sk-unknown-key", SECRET]).tenant == "a"
    with pytest.raises(UnauthenticatedError, match="not known"):
        ring.require(["sk-unknown-key"])
    with pytest.raises(UnauthenticatedError, match="is needed"):
        ring.require([])


def test_keys_are_where_openai_and_anthropic_put_them() -> None:
    assert keys_in({"authorization": "Bearer one"}.get) == ["one"]
    assert keys_in({"authorization": "bearer  one ", "x-api-key": "two"}.get) == ["one", "two"]
    assert keys_in({"authorization": "Basic one", "x-api-key": " two "}.get) == ["two"]
    assert keys_in({}.get) == []


def test_a_key_of_several_flags_is_good_for_the_most() -> None:
    digest = hash_of(SECRET)
    keys = KeyStore(api_keys=[digest], metrics_keys=[digest])
    assert not keys.caller([SECRET]).only_metrics
    keys = KeyStore(api_keys=[digest], admin_keys=[digest])
    assert keys.caller([SECRET]).is_admin


def test_without_keys_everybody_is_anybody() -> None:
    keys = KeyStore(metrics_keys=[hash_of(SECRET)])
    assert not keys.is_on
    assert keys.caller(["whatever"]).tenant == ""
    with pytest.raises(UnauthenticatedError):
        keys.reader(["whatever"])
    assert keys.reader([SECRET]).only_metrics


def write(path: Path, text: str) -> None:
    """Replace a file as tools do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def tenant_of(keys: KeyStore, key: str) -> str | None:
    try:
        return keys.caller([key]).tenant
    except UnauthenticatedError:
        return None


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(bad("one"))
    keys = KeyStore(path=str(path), admin_keys=[hash_of("sk-of-a-flag")])
    assert tenant_of(keys, SECRET) == "one"
    caplog.set_level(logging.INFO)
    keys.check()
    assert caplog.records == []
    write(path, bad("two", keys=["sk-another-key"]))
    keys.check()
    assert (tenant_of(keys, SECRET), tenant_of(keys, "sk-another-key")) == (None, "two")
    assert tenant_of(keys, "sk-of-a-flag") == "admin"
    assert "2 keys" in caplog.text


def test_a_bad_new_file_keeps_the_old_keys_and_says_so_once(tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(bad("one"))
    keys = KeyStore(path=str(path))
    for text in (f"[tenants.x]\nkeys = {SECRET}", bad("one", keys=["short"]), "\x00"):
        write(path, text)
        caplog.clear()
        keys.check()
        keys.check()
        (record,) = caplog.records
        assert "the keys stay as they were" in record.getMessage()
        assert SECRET not in record.getMessage()
        assert tenant_of(keys, SECRET) == "one"
    path.unlink()
    keys.check()
    assert tenant_of(keys, SECRET) == "one"
    write(path, bad("three"))
    keys.check()
    assert tenant_of(keys, SECRET) == "three"


def test_a_bad_file_at_the_start_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_keys_file: .*nowhere.*cannot be read"):
        KeyStore(path=str(tmp_path / "nowhere"))
    path = tmp_path / "keys.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        KeyStore(path=str(path))
    path.write_text(bad())
    with pytest.raises(ConfigError, match="given by a flag as well"):
        KeyStore(path=str(path), api_keys=[hash_of(SECRET)])
