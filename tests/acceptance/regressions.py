"""What once went wrong, and the tests that fail if it comes back: by a short name each."""

from __future__ import annotations

REGRESSIONS: dict[str, tuple[str, ...]] = {
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
        "tests/unit/http_api/test_tokenizer_routes.py::test_a_text_too_long_is_refused_before_it_is_tokenized",
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
        "tests/unit/http_api/test_document.py::test_the_page_and_all_that_it_loads_come_from_this_process",
        "tests/unit/http_api/test_document.py::test_the_document_is_the_same_each_time_and_under_both_names",
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
    "an adapter's patterns run beside steps": (
        "tests/unit/adapters/test_host_cache.py::test_an_adapters_options_are_not_read_where_it_is_loaded",
        "tests/unit/peft/test_normal.py::test_what_was_verified_is_read_without_its_options",
    ),
    "a pattern that takes minutes, or for ever": (
        "tests/unit/peft/test_matching.py",
        "tests/integration/test_adapter_chain.py::test_a_pattern_that_does_not_end_is_refused_by_its_options_name",
    ),
    "a template stops the router or takes its memory": (
        "tests/integration/test_foreign_prompts.py",
        "tests/unit/service/prompts/test_renderers.py",
    ),
    "a tokenizer is read by each who asks first": (
        "tests/unit/service/test_adapter_text.py::test_first_requests_share_one_reading_of_a_tokenizer",
    ),
    "tokenizers are counted by number, or not": (
        "tests/unit/service/test_adapter_text.py::test_tokenizers_are_held_within_their_bytes_and_read_again",
        "tests/unit/adapters/test_host_cache.py::test_tokens_of_an_adapters_own_are_counted",
        "tests/unit/engine/test_detokenizer.py::test_nine_adapters_with_tokens_of_their_own_take_turns_without_anything_made_anew",
        "tests/unit/engine/test_detokenizer.py::test_what_is_kept_of_adapters_tokens_is_bounded",
    ),
    "a tokenizer that computes": (
        "tests/unit/peft/test_tokenizer.py::test_whatever_else_differs_is_refused_by_name",
        "tests/unit/service/test_adapter_text.py::test_a_tokenizer_that_takes_all_memory_ends_its_process_alone",
    ),
    "health is green while no text can be tokenized": (
        "tests/unit/service/test_inference.py::test_health_notices_that_no_text_can_be_tokenized",
    ),
    "who waits for one adapter takes everybody's permits": (
        "tests/unit/service/adapters/test_waiting.py::test_a_crowd_for_an_adapter_that_never_comes_is_refused_alone",
        "tests/unit/service/adapters/test_waiting.py::test_a_source_that_never_answers_refuses_its_own_requests_only",
        "tests/unit/service/adapters/test_waiting.py::test_a_preparation_that_hangs_takes_no_permit_from_anybody_else",
    ),
    "a load that fails half way keeps its slot, and nobody hears": (
        "tests/unit/lora/test_model.py::test_a_load_that_fails_at_any_part_leaves_the_slot_empty",
        "tests/unit/engine/test_engine_adapters.py::test_an_adapter_that_did_not_take_effect_can_the_next_time",
        "tests/unit/service/test_engine_loop.py::test_an_adapter_that_does_not_take_effect_fails_its_requests_until_it_does",
    ),
    "bytes that are still held are promised again": (
        "tests/unit/service/adapters/test_waiting.py::test_memory_that_is_not_known_to_be_free_is_promised_to_nobody",
        "tests/unit/service/adapters/test_waiting.py::test_what_could_not_be_prepared_is_released_before_its_memory_is_promised",
    ),
    "a device stays broken and health stays green": (
        "tests/integration/test_broken_device.py",
        "tests/unit/engine/test_engine.py::test_a_device_that_fails_at_a_trivial_pass_too_is_said_to_be_broken",
        "tests/unit/rpc/test_queue.py::test_what_breaks_the_engine_ends_all_calls_and_is_told",
    ),
    "fetches under one name mix up": (
        "tests/integration/test_fetcher.py::test_a_fetch_that_ends_leaves_the_one_that_followed_it_alone",
        "tests/integration/test_fetcher.py::test_a_fetch_that_followed_another_ends_with_the_server",
    ),
    "a fetch costs what the store holds": (
        "tests/unit/store/test_index.py::test_work_does_not_grow_with_the_store",
        "tests/unit/store/test_index.py::test_an_eviction_looks_at_what_it_evicts_only",
    ),
    "private adapters are listed and managed by anybody": (
        "tests/unit/service/adapters/test_access.py",
    ),
    "a failed call is a failed generation": (
        "tests/integration/shards/test_grpc_client.py::test_a_step_answered_with_any_status_is_an_error_of_the_shard",
    ),
    "lists, scrapes and plans cost what is known": (
        "tests/unit/service/adapters/test_list.py::test_a_page_a_scrape_and_a_request_cost_the_same_with_many_names_as_with_few",
        "tests/unit/core/test_adapters.py::test_a_decision_costs_what_there_are_slots_for_and_not_what_waits_or_is_known",
    ),
    "orders have no epoch, lost shards keep their size": (
        "tests/unit/core/test_scheduler.py::test_what_comes_of_an_order_for_shards_that_are_gone_is_void",
        "tests/unit/core/test_scheduler.py::test_requests_that_shards_with_less_memory_can_never_hold_end_in_words",
    ),
    "unload and load give the old content": (
        "tests/unit/service/adapters/test_reload.py::test_after_an_unload_the_source_is_asked_also_where_another_name_has_the_content",
    ),
    "a load answers from a remembered failure": (
        "tests/unit/service/adapters/test_reload.py::test_an_explicit_load_asks_the_source_whatever_is_remembered",
    ),
    "the reason of a failed reload vanishes": (
        "tests/unit/service/adapters/test_reload.py::test_after_a_failed_reload_the_old_goes_on_and_the_reason_stays_until_one_succeeds",
    ),
    "one folder has four names": (
        "tests/unit/service/adapters/test_spellings.py",
        "tests/unit/fetching/test_source_local.py::test_each_spelling_of_a_folder_is_answered_with_one",
    ),
    "a fetch that waits its turn is not ready": (
        "tests/integration/shards/test_grpc_client.py::test_a_fetch_waits_its_turn_for_longer_than_any_call_may_take",
    ),
    "a silent call is cut for its pings": (
        "tests/integration/shards/test_grpc_client.py::test_a_silent_call_outlasts_the_pings_meanwhile",
        "tests/unit/proto/test_transport.py::test_every_channel_option_is_one_that_the_library_knows",
    ),
    "a pointer of LFS, a stub, a string for a list, another prefix, a changed base": (
        "tests/unit/peft/test_read.py::test_pointers_of_git_lfs_are_known_for_what_they_are",
        "tests/unit/peft/test_read.py::test_names_with_another_beginning_are_told_beside_the_expected_one",
        "tests/unit/peft/test_config.py::test_a_stub_of_a_configuration_is_refused_for_what_is_missing",
        "tests/unit/peft/test_config.py::test_starts_that_changed_the_base_are_refused",
        "tests/unit/peft/test_targets.py::test_a_string_where_a_list_is_meant_is_refused_by_its_list",
    ),
    "a folder of mlx-lm is refused": (
        "tests/unit/peft/test_mlx.py",
        "tests/integration/test_adapter_chain.py::test_what_mlx_saved_computes_as_mlx_does",
    ),
    "a folder in a file's place, a missing folder": (
        "tests/unit/fetching/test_source_local.py::test_what_is_no_file_in_place_of_one_is_refused_and_does_not_hang",
        "tests/unit/http_api/test_adapters.py::test_what_cannot_be_loaded_is_said_in_words_and_in_the_list",
    ),
    "a folder that cannot be written is a bug, or a full disk": (
        "tests/integration/test_read_only_folders.py",
        "tests/unit/launcher/test_run_dir.py::test_where_nothing_can_be_written_it_is_said_in_one_sentence",
    ),
    "adapters of different modules do not merge": (
        "tests/integration/test_merge_oracle.py::test_adapters_that_pick_modules_merge_to_the_union",
        "tests/unit/peft/test_merge.py::test_a_merge_changes_what_any_of_its_adapters_changes",
    ),
    "LoRAX's adapter calls, and positions that the model has not": (
        "tests/integration/test_lorax_adapters.py::test_the_base_model_is_never_loaded_nor_what_is_unknown_offloaded",
        "tests/integration/test_lorax_adapters.py::test_what_the_model_has_no_positions_for_is_refused",
    ),
    "half a character at the end": (
        "tests/unit/engine/test_output.py::test_a_character_that_the_end_cuts_off_is_left_out",
    ),
    "what is odd about an adapter is not said": (
        "tests/unit/peft/test_targets.py::test_options_without_effect_are_warnings",
        "tests/unit/peft/test_read.py::test_another_base_models_name_is_a_warning",
        "tests/unit/http_api/test_adapters.py::test_what_is_odd_about_an_adapter_is_in_the_list",
    ),
    "the store keeps leftovers and is open to others": (
        "tests/unit/store/test_store.py::test_only_the_last_of_many_broken_off_fetches_are_kept",
        "tests/unit/store/test_store.py::test_no_lock_file_outlives_its_holders",
        "tests/unit/store/test_store.py::test_others_on_this_machine_cannot_read_it",
    ),
    "a shard grows with every number of rows": ("tests/unit/test_kernel_caches.py",),
    "the house has circles, prefixes and doubled names": ("tests/architecture/test_structure.py",),
}
