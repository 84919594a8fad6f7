"""What once went wrong, and the tests that failed then: by a short name each."""

from __future__ import annotations

FAULTS: dict[str, tuple[str, ...]] = {
    "a style of tomorrow's transformers refuses a model": (
        "tests/unit/parallel/test_styles.py",
        "tests/integration/test_families.py::test_a_style_that_is_not_known_costs_a_copy_of_its_block_and_no_answer",
    ),
    "figures are read from the source of a failed test": ("tests/unit/acceptance/test_suites.py",),
    "the router is blamed for the end of a shard": (
        "tests/unit/launcher/test_supervisor.py::test_a_dead_shard_is_blamed_for_the_router_that_misses_it",
    ),
    "clients that never read keep their places": (
        "tests/unit/http_api/test_slow_clients.py::test_a_place_is_free_when_the_generation_ends_not_when_its_client_has_read_it",
        "tests/unit/http_api/test_slow_clients.py::test_a_stream_that_is_too_far_behind_is_ended_and_its_row_with_it",
        "tests/integration/test_router_process.py::test_clients_that_never_read_keep_no_place_and_do_not_hold_up_the_end",
    ),
    "trailers without end, and trailers taken for headers": (
        "tests/unit/http_api/test_slow_clients.py::test_what_frames_a_request_is_bounded",
        "tests/unit/http_api/test_slow_clients.py::test_a_trailer_is_no_header",
    ),
    "heads, bodies and first bytes that never come": (
        "tests/unit/http_api/test_slow_clients.py::test_what_never_comes_is_waited_for_only_so_long",
        "tests/unit/http_api/test_slow_clients.py::test_connections_are_counted_and_who_only_waits_makes_room",
    ),
    "a text that can never fit is tokenized": (
        "tests/unit/service/prompts/test_char_bound.py",
        "tests/unit/service/test_validation.py::test_a_text_that_can_never_fit_is_refused_before_it_is_tokenized",
        "tests/unit/http_api/test_ops.py::test_a_text_too_long_is_refused_before_it_is_tokenized",
    ),
    "any page, and any machine, may unload adapters": (
        "tests/unit/http_api/test_admin.py",
        "tests/unit/http_api/test_adapters.py::test_where_clients_ask_adapters_are_told_of_and_not_managed",
        "tests/unit/http_api/test_ops.py::test_no_page_of_another_origin_may_call_by_default",
        "tests/unit/launcher/test_resolve.py::test_strangers_are_let_in_only_where_that_is_asked_for",
        "tests/integration/test_router_process.py::test_adapters_are_managed_apart_from_clients",
    ),
    "429 without a time, and after the body": (
        "tests/unit/http_api/test_errors.py::test_overload_is_429_and_says_when_to_come_again",
        "tests/unit/http_api/test_errors.py::test_what_no_body_could_change_is_said_before_the_body_is_read",
        "tests/unit/http_api/test_errors.py::test_a_draining_server_answers_503",
    ),
    "LoRAX's command lines are refused": ("tests/unit/launcher/test_lorax_command_lines.py",),
    "LoRAX's answers at the edges differ": (
        "tests/unit/http_api/test_lorax_values.py",
        "tests/unit/http_api/test_ops.py::test_what_can_be_read_can_be_asked_for_its_head",
        "tests/unit/http_api/test_ops.py::test_docs_page",
        "tests/unit/http_api/test_ops.py::test_the_document_is_found_under_both_names",
        "tests/integration/test_http_engine.py::test_the_dtype_is_told_in_torch_s_name_as_lorax_tells_it",
    ),
    "two sizes of the KV cache, one of which counts": (
        "tests/unit/launcher/test_resolve.py::test_two_sizes_of_the_kv_cache_get_a_word",
    ),
    "a bad body in a parser's words": (
        "tests/unit/http_api/test_errors.py::test_what_people_run_into_is_said_in_plain_words",
    ),
    "a penalty that makes infinities": (
        "tests/unit/service/test_sampling_rules.py::test_values_out_of_bounds_are_refused_by_name",
    ),
    "cancelled requests are errors at the end": (
        "tests/unit/http_api/test_slow_clients.py::test_at_the_end_a_request_that_hears_nothing_is_no_error_of_the_server",
    ),
    "a stream that cannot begin is a 200": (
        "tests/unit/http_api/test_errors.py::test_a_stream_that_cannot_begin_gets_the_status_of_its_error",
    ),
    "refused bodies are failures and no requests": (
        "tests/unit/http_api/test_errors.py::test_bodies_that_are_refused_are_counted_as_requests_and_as_failures",
    ),
    "the router has a token that it does not use": (
        "tests/unit/launcher/test_resolve.py::test_the_router_gets_the_hub_token_only_for_adapters_that_it_loads_itself",
        "tests/unit/launcher/test_supervisor.py::test_tokens_travel_in_the_environment_only_and_where_they_are_needed",
    ),
    "configurations without an option": ("tests/unit/launcher/test_options_reach_configs.py",),
}
