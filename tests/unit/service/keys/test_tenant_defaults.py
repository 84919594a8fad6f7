"""What counts for tenants of whom the keys say nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from lorax_contract.config import ConfigError, RouterConfig
from lorax_router.core.tenant_limits import TenantLimits
from lorax_router.service.callers import Quotas
from lorax_router.service.keys.tenant_defaults import tenant_limits


def config(**values: Any) -> RouterConfig:
    return RouterConfig(model_id="m", tokenizer_dir="t", shard_uri="unix:s", **values)


def test_without_keys_or_words_there_is_no_limit() -> None:
    assert tenant_limits(config()) == TenantLimits()
    assert tenant_limits(config(max_queued_requests=10)) == TenantLimits()


def test_where_tenants_are_told_apart_none_takes_more_than_half_of_the_queue() -> None:
    keyed = {"api_keys_file": "keys.toml"}
    assert tenant_limits(config(**keyed)).queued_requests == 512
    few = config(**keyed, max_queued_requests=10, max_queued_tokens=1)
    assert tenant_limits(few) == TenantLimits(queued_requests=5, queued_tokens=1)


def test_what_is_said_counts_and_a_tenants_own_word_most() -> None:
    said = config(api_keys_file="k", tenant_queued_requests=7, tenant_queued_tokens=900)
    assert tenant_limits(said) == TenantLimits(queued_requests=7, queued_tokens=900)
    own = Quotas(queued_tokens=100).limits(tenant_limits(said))
    assert own == TenantLimits(queued_requests=7, queued_tokens=100)


def test_shares_are_said_for_all_and_for_one() -> None:
    said = config(tenant_kv_share=0.5, tenant_adapter_share=0.25)
    assert tenant_limits(said) == TenantLimits(kv_share=0.5, adapter_share=0.25)
    own = Quotas(kv_share=0.75).limits(tenant_limits(said))
    assert own == TenantLimits(kv_share=0.75, adapter_share=0.25)
    for name in ("tenant_kv_share", "tenant_adapter_share"):
        with pytest.raises(ConfigError, match=name):
            config(**{name: 1.5})


@pytest.mark.parametrize(
    "name",
    ["max_queued_requests", "max_queued_tokens", "tenant_queued_requests", "tenant_queued_tokens",
     "tenant_concurrent_fetches"],
)  # fmt: skip
def test_a_limit_of_nothing_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config(**{name: 0})
