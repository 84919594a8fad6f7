"""The file of keys: tenants, whom which keys stand for, and what each tenant may take.

TOML, or JSON of the same shape. What is wrong is said by where it stands, never by its value:
it may be a key.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from lorax_contract.config import ConfigError
from lorax_contract.keys import check_key, hash_of
from lorax_router.service.callers import KEYED_OPERATOR, Caller, Quotas

# Whom the keys of flags stand for.
DEFAULT_TENANT = "default"
ADMIN_TENANT = "admin"
METRICS_TENANT = "metrics"
_RESERVED = (DEFAULT_TENANT, ADMIN_TENANT, METRICS_TENANT, KEYED_OPERATOR.tenant)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_COUNTS = (
    "requests_per_minute", "tokens_per_minute", "fetches_per_minute", "store_bytes",
    "queued_requests", "queued_tokens", "concurrent_fetches",
)  # fmt: skip
_SHARES = ("kv_share", "adapter_share")
_SWITCHES = ("admin", "metrics")
_TEXTS = ("keys", "adapters")
_FIELDS = {*_COUNTS, *_SHARES, *_SWITCHES, *_TEXTS, "pins", "priority", "weight", "api_token_env"}


def parse_tenants(text: str, environment: Mapping[str, str] = os.environ) -> dict[str, Caller]:
    """Return whom each hash stands for; raises ConfigError, which names no key."""
    document = _document(text)
    if unknown := sorted(document.keys() - {"tenants"}):
        raise ConfigError(f"unknown at the top: {', '.join(unknown)}; there is `tenants` only")
    tenants = document.get("tenants")
    if not isinstance(tenants, dict) or not tenants:
        raise ConfigError("`tenants` is missing or empty: it maps names to their keys")
    callers: dict[str, Caller] = {}
    for name, values in tenants.items():
        caller = _caller(name, values, environment)
        for key in _hashes(name, values):
            if callers.setdefault(key, caller) is not caller:
                raise ConfigError(
                    f"tenants {callers[key].tenant} and {name} share a key: a key is one tenant's"
                )
    return callers


def _document(text: str) -> dict[str, Any]:
    is_json = text.lstrip()[:1] == "{"
    kind = "JSON" if is_json else "TOML"
    try:
        document = json.loads(text) if is_json else tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"it is not valid {kind}: it nests too deeply") from None
    except ValueError as error:
        # Of the parser's words the place only: the rest may quote what it could not read.
        place = re.search(r"line \d+,? column \d+", str(error))
        raise ConfigError(f"it is not valid {kind}" + (f": {place[0]}" if place else "")) from None
    return document if isinstance(document, dict) else {}


def _caller(name: str, values: Any, environment: Mapping[str, str]) -> Caller:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "the name of a tenant has 1 to 64 letters, digits, dots, dashes and underscores"
        )
    if name in _RESERVED:
        raise ConfigError(f"tenant {name}: the name is that of the keys given by flags")
    if not isinstance(values, dict):
        raise ConfigError(f"tenant {name}: must be a table of its keys and quotas")
    if unknown := sorted(values.keys() - _FIELDS):
        raise ConfigError(f"tenant {name}: unknown fields: {', '.join(unknown)}")
    for field in _SWITCHES:
        if not isinstance(values.get(field, False), bool):
            raise ConfigError(f"tenant {name}: `{field}` must be true or false")
    for field in _TEXTS:
        if not _is_texts(values.get(field, [])):
            raise ConfigError(f"tenant {name}: `{field}` must be a list of texts")
    is_admin: bool = values.get("admin", False)
    may_read_metrics: bool = values.get("metrics", is_admin)
    return Caller(
        tenant=name,
        is_admin=is_admin,
        may_read_metrics=may_read_metrics,
        priority=_integer(name, values, "priority", least=-(2**31), default=0) or 0,
        weight=_weight(name, values),
        quotas=Quotas(
            **{field: _integer(name, values, field, least=1) for field in _COUNTS},
            kv_share=_share(name, values, "kv_share"),
            adapter_share=_share(name, values, "adapter_share"),
            pins=_integer(name, values, "pins", least=0, default=0) or 0,
        ),
        adapters=tuple(values["adapters"]) if "adapters" in values else None,
        api_token=_api_token(name, values, environment),
    )


def _hashes(name: str, values: Mapping[str, Any]) -> list[str]:
    """The hashes of a tenant's keys; those that are in the file as hashes are taken as they are."""
    keys: list[str] = values.get("keys", [])
    if not keys:
        raise ConfigError(f"tenant {name}: `keys` is missing or empty")
    hashes = []
    for place, key in enumerate(keys, 1):
        if key.startswith("sha256:"):
            if not _HASH.fullmatch(key.lower()):
                raise ConfigError(f"tenant {name}: key {place} is no sha256 in 64 hex digits")
            hashes.append(key.lower().removeprefix("sha256:"))
        else:
            check_key(key, f"tenant {name}: key {place}")
            hashes.append(hash_of(key))
    return hashes


def _integer(
    name: str, values: Mapping[str, Any], field: str, *, least: int, default: int | None = None
) -> int | None:
    if field not in values:
        return default
    value = values[field]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**53:
        raise ConfigError(f"tenant {name}: `{field}` must be a whole number from {least}")
    return value


def _share(name: str, values: Mapping[str, Any], field: str) -> float | None:
    value = values.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ConfigError(f"tenant {name}: `{field}` must be a number above 0 and at most 1")
    return float(value)


def _weight(name: str, values: Mapping[str, Any]) -> float:
    value = values.get("weight", 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.001 <= value <= 1000:
        raise ConfigError(f"tenant {name}: `weight` must be a number from 0.001 to 1000")
    return float(value)


def _api_token(name: str, values: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    """The tenant's own token for the hub, from the variable that the file names."""
    variable = values.get("api_token_env")
    if variable is None:
        return None
    token = environment.get(variable, "").strip() if isinstance(variable, str) else ""
    if not token:
        raise ConfigError(
            f"tenant {name}: `api_token_env` must name a variable that holds a token for the hub"
        )
    return token


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each for each in value)
