"""The names of vLLM: there from the start, and true of what was served."""

from __future__ import annotations

import asyncio
import json
import re

import httpx
import pytest
from tests.helpers.http_app import World

SAMPLE = re.compile(r"(?P<name>vllm:\w+)(?:\{(?P<labels>.*)\})? (?P<value>\S+)")
# What the gateways' router protocol, the autoscalers and vLLM's own dashboard read.
READ_BY_GATEWAYS = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:gpu_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count",
    "vllm:time_per_output_token_seconds_count",
    "vllm:request_time_per_output_token_seconds_count",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_count",
    "vllm:request_inference_time_seconds_count",
    "vllm:request_prefill_time_seconds_count",
    "vllm:request_decode_time_seconds_count",
    "vllm:request_prompt_tokens_count",
    "vllm:request_generation_tokens_count",
    "vllm:request_params_max_tokens_count",
    "vllm:request_params_n_count",
    "vllm:iteration_tokens_total_count",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
}


async def scraped(client: httpx.AsyncClient) -> dict[str, float]:
    """Every sample of vLLM's names, by name and labels as they are written."""
    text = (await client.get("/metrics")).text
    found = [match for line in text.splitlines() if (match := SAMPLE.fullmatch(line))]
    return {f"{each['name']}{{{each['labels']}}}": float(each["value"]) for each in found}


def of(samples: dict[str, float], name: str, **labels: str) -> float:
    wanted = {"engine": "0", "model_name": "tests/tiny", **labels}
    written = ",".join(f'{key}="{value}"' for key, value in sorted(wanted.items()))
    return samples[f"{name}{{{written}}}"]


def test_all_names_are_there_before_the_first_request_and_counters_are_0():
    async def check() -> None:
        world = World()
        async with world.client() as client:
            samples = await scraped(client)
        names = {each.partition("{")[0] for each in samples}
        assert names >= READ_BY_GATEWAYS
        counts = {
            each: value
            for each, value in samples.items()
            if each.partition("{")[0].endswith(("_total", "_count", "_sum", "_bucket"))
            # What the scripted engine says.
            and not each.startswith("vllm:num_preemptions_total")
        }
        assert set(counts.values()) == {0.0}
        for reason in ("stop", "length", "abort", "error"):
            assert of(samples, "vllm:request_success_total", finished_reason=reason) == 0

    asyncio.run(check())


def test_counters_are_declared_by_the_name_that_their_samples_have():
    async def check() -> None:
        async with World().client() as client:
            text = (await client.get("/metrics")).text
            document = (await client.get("/metrics", headers={"accept": "application/json"})).json()
        assert "# TYPE vllm:prompt_tokens_total counter" in text.splitlines()
        assert document["vllm:prompt_tokens_total"]["type"] == "counter"

    asyncio.run(check())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_what_was_served_is_counted_under_both_names(path):
    async def check() -> None:
        world = World()
        body = {"inputs": "one two three", "parameters": {"max_new_tokens": 4}}
        async with world.client() as client:
            answer = await client.post(path, json=body)
            assert answer.status_code == 200
            samples = await scraped(client)
        num = of(samples, "vllm:request_generation_tokens_sum")
        assert num >= 1
        assert of(samples, "vllm:generation_tokens_total") == num
        assert of(samples, "vllm:prompt_tokens_total") == 4  # a start token in front
        assert of(samples, "vllm:request_prompt_tokens_sum") == 4
        assert of(samples, "vllm:request_params_max_tokens_sum") == 4
        assert of(samples, "vllm:time_to_first_token_seconds_count") == 1
        assert of(samples, "vllm:inter_token_latency_seconds_count") == num - 1
        assert of(samples, "vllm:time_per_output_token_seconds_count") == num - 1
        assert of(samples, "vllm:e2e_request_latency_seconds_count") == 1
        assert of(samples, "vllm:e2e_request_latency_seconds_sum") == world.metric(
            "lorax_request_duration_sum"
        )
        ended = [
            of(samples, "vllm:request_success_total", finished_reason=reason)
            for reason in ("stop", "length")
        ]
        assert sum(ended) == 1

    asyncio.run(check())


def test_a_request_that_was_never_valid_ends_for_no_reason():
    async def check() -> None:
        async with World().client() as client:
            refused = await client.post(
                "/generate", content=json.dumps({"inputs": ""}),
                headers={"content-type": "application/json"},
            )  # fmt: skip
            assert refused.status_code == 422
            samples = await scraped(client)
        for reason in ("stop", "length", "abort", "error"):
            assert of(samples, "vllm:request_success_total", finished_reason=reason) == 0

    asyncio.run(check())
