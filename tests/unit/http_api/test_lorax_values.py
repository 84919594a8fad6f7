"""Values at the edges of LoRAX's types get LoRAX's answer."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from tests.helpers.http_app import World

from lorax_router.http_api.lorax.bodies import AdapterBody, ParametersBody

ADAPTERS = {"ids": ["a", "b"], "weights": [0.5, 0.5]}


def ask(path: str = "/generate", **params: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with World().client() as client:
            return await client.post(path, json={"inputs": "w1", "parameters": params})

    return asyncio.run(run())


@pytest.mark.parametrize(
    "params",
    [
        {"stop": [""]},
        {"stop": ["", "", "", "", "", "x"]},
        {"best_of": 0},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "Text", "schema": {"type": "object"}}},
        {"response_format": None},
        {"adapter_source": "LOCAL"},
        {"top_k": 2147483647},
    ],
)
def test_what_lorax_answers_is_answered(params):
    response = ask(**params)
    assert response.status_code == 200, response.text
    assert response.json() == ask().json()


@pytest.mark.parametrize("field", ["details", "do_sample", "watermark", "decoder_input_details",
                                   "ignore_eos_token", "apply_chat_template", "stop"])  # fmt: skip
def test_a_null_where_lorax_takes_none_is_a_wrong_type(field):
    response = ask(**{field: None})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert f"`parameters.{field}`" in response.json()["error"]


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 2147483648},
        {"best_of": -1},
        {"response_format": {"type": "json_object"}},
        {"response_format": {}},
        {"response_format": "text"},
    ],
)
def test_what_lorax_refuses_or_binds_is_refused(params):
    response = ask(**params)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")


def test_names_of_sources_and_rules_are_taken_in_any_case():
    merged = {**ADAPTERS, "merge_strategy": "DARE_Ties", "majority_sign_method": "TOTAL"}
    body = ParametersBody.model_validate({"adapter_source": "Hub", "merged_adapters": merged})
    domain = body.to_domain(None)
    assert domain.adapter_source == "hub"
    assert domain.merged_adapters is not None
    assert domain.merged_adapters.merge_strategy == "dare_ties"
    assert domain.merged_adapters.majority_sign_method == "total"
    managed = AdapterBody(adapter_id="org/A", adapter_source="S3").to_domain(None)
    # Names are another matter.
    assert (managed.adapter_source, managed.adapter_id) == ("s3", "org/A")


@pytest.mark.parametrize("ids", ["ids", "adapter_ids"])
@pytest.mark.parametrize("field", ["merged_adapters", "adapter_parameters"])
def test_a_merge_has_the_name_of_lorax_s_code_or_of_its_document(field, ids):
    merge = {ids: ["a", "b"], "weights": [0.5, 0.5]}
    merged = ParametersBody.model_validate({field: merge}).to_domain(None).merged_adapters
    assert merged is not None
    assert (merged.ids, merged.weights) == (["a", "b"], [0.5, 0.5])


def test_a_merge_under_both_names_is_refused_in_words():
    response = ask(merged_adapters=ADAPTERS, adapter_parameters=ADAPTERS)
    assert response.status_code == 422
    assert "`adapter_parameters` is another name of `merged_adapters`" in response.json()["error"]
