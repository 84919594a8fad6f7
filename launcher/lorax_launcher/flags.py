"""The options of the command line: one table, from which parser and docs/cli.md are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from lorax_contract.config import BATCHINGS, SCHEDULING_POLICIES
from lorax_contract.keys import (
    ADMIN_KEY_VARIABLES,
    API_KEY_VARIABLES,
    METRICS_KEY_VARIABLES,
    SSL_PASSWORD_VARIABLE,
)
from lorax_launcher.options import LauncherOptions
from lorax_launcher.quantize import CHOICES as QUANTIZE_CHOICES
from lorax_launcher.refused import REFUSED_OPTIONS, Refused
from lorax_launcher.values import LogLevel, Switch, TaskName

SWITCH = Switch()
_DEFAULTS = LauncherOptions()
_COUNT = click.IntRange(min=1)
_SHARE = click.FloatRange(min=0.0, max=1.0, min_open=True)
_PORT = click.IntRange(min=0, max=65535)
_SOURCES = click.Choice(["hub", "local", "s3", "pbase"])


def _option(
    *names: str, help: str, env: str | Sequence[str] | None = "", **settings: Any
) -> click.Option:
    """Make one option; its variable is the flag in capitals, unless ``env`` says otherwise."""
    long = next(name for name in names if name.startswith("--"))
    variable = long.removeprefix("--").replace("-", "_")
    declared = next((name for name in names if not name.startswith("-")), variable)
    default = getattr(_DEFAULTS, declared, None)
    settings.setdefault("default", default)
    is_switch = settings.get("type") is SWITCH
    settings.setdefault("show_default", default is not None and not is_switch)
    if is_switch:
        settings.update(is_flag=False, flag_value=True, metavar="")
    return click.Option(
        list(names),
        help=help,
        envvar=variable.upper() if env == "" else env,
        show_envvar=True,
        **settings,
    )


# Flags that take all values that follow.
_SEVERAL = ("--lora-modules", "--served-model-name")
# Groups in the order of --help and docs/cli.md.
OPTION_GROUPS: dict[str, list[click.Option]] = {
    "Model": [
        _option("--model-id", type=str, help="Hub id (`name` or `name@revision`), folder or .gguf "
                "file. Without it the embedded SmolLM2-135M-Instruct is served."),
        _option("--revision", type=str, help="Branch, tag or commit of a hub model."),
        _option("--source", type=click.Choice(["hub", "local", "s3"]),
                help="Where the model comes from. `s3`: --model-id is a prefix with its safetensors, "
                "like s3://bucket/prefix; needs `lorax-py[s3]`."),
        _option("--served-model-name", multiple=True,
                help="What requests may call the model, the first of which answers show; several "
                "may follow the flag (default: the model's id, which is always taken)."),
        _option("--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
                help="Type of weights and KV cache; `auto`: float32 on CPU, the model's own on a "
                "GPU."),
        _option("--quantize", type=click.Choice(QUANTIZE_CHOICES, case_sensitive=False),
                help="Store the weights of linears in fewer bits. On CPUs `int8`, with a scale for each "
                "output, or `gguf`, in the blocks of the GGUF file that the model comes from; rows, sums and adapters stay float32. "
                "On GPUs `fp8`, which rounds rows too, or `int4`, in groups. LoRAX's names are known: "
                "each is served as one of these, says what a checkpoint says itself (`gptq`, `awq`), or is refused with "
                "what to use instead."),
        _option("--trust-remote-code", type=SWITCH,
                help="Run model code that comes with the model."),
        _option("--task", type=TaskName(),
                help="What the model is served for. `auto`: as its files show. `embed`: vectors alone, "
                "without its head of tokens or labels; `generate`, `classify`, `token-classify` and `rerank` "
                "refuse a model that has no such head. vLLM's and the hub's names for these are taken, too: "
                "docs/encoders.md."),
        _option("--tokenizer-config-path", type=click.Path(dir_okay=False),
                help="A tokenizer_config.json whose chat template replaces the model's."),
        _option("--chat-template", type=str,
                help="A chat template that replaces the model's: a file, or the template itself."),
        _option("--chat-template-content-format",
                type=click.Choice(["auto", "string", "openai"]),
                help="Whether the chat template reads the content of a message as one text "
                "(`string`) or as a list of parts (`openai`); `auto`: as its syntax shows."),
        _option("--tool-call-parser", type=str,
                help="What reads tool calls in answers: `hermes`, `llama3_json`, `mistral`, "
                "`pythonic`, `qwen3_coder` or `none`; `auto`: what the chat template or the model's "
                "family shows, else `hermes`. See docs/chat.md."),
        _option("--tool-parser-plugin", type=str,
                help="`module:Class` of a parser of your own, a ToolCallParser."),
        _option("--reasoning-parser", type=str,
                help="What splits reasoning from the content of answers: `think` (`<think>` tags) or "
                "`none`; `auto`: `think` if the chat template has `</think>`."),
        _option("--cache-dir", type=click.Path(file_okay=False), env="LORAX_CACHE",
                help="Where prepared models, compiled kernels and measurements are kept "
                "(default: ~/.cache/lorax-py)."),
        _option("--huggingface-hub-cache", type=click.Path(file_okay=False),
                help="Where downloads from the hub are kept."),
    ],
    "Device": [
        _option("--device", type=click.Choice(["auto", "cpu", "cuda"]),
                help="`auto`: a GPU if one is visible and the installed torch can use it."),
        _option("--sharded", type=click.BOOL, metavar="true|false",
                help="Spread the model over all visible GPUs, or over `--num-shard` (default: "
                "over all visible GPUs, on a CPU one shard)."),
        _option("--num-shard", type=int,
                help="Shards that hold the model together, each with a part of every layer (tensor "
                "parallelism)."),
        _option("--attention-backend", type=str, help="Attention implementation of the shard."),
        _option("--linear-backend", type=str, help="Matrix product implementation of the shard."),
        _option("--elementwise-backend", type=str,
                help="What computes norms, gated activations and rotary embeddings: `triton` on a "
                "GPU or `cpp` on a CPU, in one pass each; `torch`, the model's own code; `auto`: the "
                "first that can run. See docs/models.md."),
        _option("--eager", type=SWITCH,
                help="Launch every step kernel by kernel. Without it a GPU replays decode steps as "
                "CUDA graphs, which are captured and checked at the start (docs/gpu.md), and a CPU computes "
                "passes as programs (docs/architecture.md)."),
        _option("--compile-max-batch-size", type=click.IntRange(1, 512),
                help="Requests of the largest decode step that is a graph; larger steps are launched "
                "kernel by kernel."),
        _option("--compile-max-rank", type=_COUNT,
                help="Rank of adapters up to which graphs compute them; steps with others are "
                "launched kernel by kernel (default: --max-adapter-rank)."),
        _option("--disable-custom-kernels", type=SWITCH,
                help="Compute with torch's own operations: the backends `sdpa` (attention), `torch` "
                "(matrix products, elementwise work) and `cpu` (adapters), where no other is named."),
        _option("--cuda-memory-fraction", type=_SHARE,
                help="Share of a GPU's whole memory that this server takes of it, weights included. "
                "Only a GPU can be shared so: on a CPU less than 1 is refused."),
        _option("--kv-memory-fraction", type=_SHARE,
                help="Share that the KV cache takes of what weights, the largest step and adapters "
                "leave of --cuda-memory-fraction and of what is free; the rest stays unused "
                "(default: 0.5 on CPU, 0.9 on a GPU)."),
        _option("--memory-wiggle-room", type=_SHARE,
                help="LoRAX's name for --kv-memory-fraction: the same share, counted once."),
        _option("--kv-cache-dtype", type=click.Choice(["auto", "fp8_e4m3"]),
                help="How K and V are stored: `auto` in --dtype, `fp8_e4m3` in a byte each, rounded "
                "to three bits of mantissa. That holds two to four times the tokens; the attention "
                "backends `sdpa` and `torch` read it."),
        _option("--block-size", type=_COUNT, help="Tokens in one block of the KV cache."),
        _option("--num-blocks", type=_COUNT,
                help="A fixed number of KV blocks instead of measuring."),
    ],
    "Adapters": [
        _option("--adapter-id", type=str,
                help="The adapter of requests that name none. It stays loaded."),
        _option("--adapter-source", type=_SOURCES,
                help="Where --adapter-id comes from, and adapters whose requests name no source. "
                "`pbase` is refused in this version."),
        _option("--default-adapter-source", type=_SOURCES,
                help="Where adapters come from whose requests name no source (default: "
                "--adapter-source)."),
        _option("--preloaded-adapter-ids", multiple=True,
                help="An adapter that is loaded before the server is ready, and stays. Others are "
                "loaded on demand all the same."),
        _option("--preloaded-adapter-source", type=_SOURCES,
                help="Where --preloaded-adapter-ids come from (default: --adapter-source)."),
        _option("--lora-modules", multiple=True,
                help="An adapter with a name of its own, as `name=path` or as JSON with `name` and "
                "`path`; several may follow the flag. The path is a folder, which needs no root, "
                "an s3:// prefix, or an id of the default source; hub:, local: and s3: in front say "
                "which. It is loaded before the server is ready, and stays."),
        _option("--lora-adapters", type=str,
                help="TGI's way to say --lora-modules: `name=path` or an id that is its own name, "
                "separated by commas."),
        _option("--merge-adapter-weights", type=SWITCH,
                help="Make --adapter-id part of the weights; requests can then name no adapter."),
        _option("--adapter-local-root", multiple=True, type=click.Path(file_okay=False),
                help="A folder below which `local` adapters may lie, beside those whose "
                "paths --adapter-id and --preloaded-adapter-ids give; without any the source is off."),
        _option("--adapter-s3-root", multiple=True,
                help="Like s3://bucket/prefix: where `s3` adapters may lie; s3:// allows every "
                "bucket. Without one the source is off."),
        _option("--max-active-adapters", type=click.IntRange(min=1),
                help="Adapters on the shards at once; further ones take turns."),
        _option("--adapter-cycle-time-s", type=click.FloatRange(min=0.0, min_open=True),
                help="How long an adapter waits for its turn before another one must make room."),
        _option("--adapter-memory-fraction", type=click.FloatRange(min=0.0, max=1.0, max_open=True),
                help="Share that is kept for adapters of what weights and the largest step leave of "
                "--cuda-memory-fraction and of what is free (LoRAX: of the whole GPU)."),
        _option("--adapter-host-memory-gb", type=click.FloatRange(min=0.0),
                help="Host memory for parsed adapters that are not on the shards now."),
        _option("--adapter-store-dir", type=click.Path(file_okay=False),
                help="Where adapters' files are kept (default: `adapters` in --cache-dir)."),
        _option("--adapter-registry", type=click.Path(dir_okay=False),
                help="A file that keeps which adapters were named, pinned or loaded by hand, without any "
                "token, so that the next server knows them; `none`: they are forgotten (default: a file "
                "of this port's in --adapter-store-dir)."),
        _option("--adapter-store-gb", type=click.FloatRange(min=0.0, min_open=True),
                help="Disk space for adapters' files."),
        _option("--adapter-concurrency", type=_COUNT,
                help="Adapters that are fetched at the same time."),
        _option("--adapter-timeout-s", type=click.FloatRange(min=0.0, min_open=True),
                help="Seconds that fetching an adapter may take, from its turn on."),
        _option("--adapter-refresh-s", type=click.FloatRange(min=0.0),
                help="Seconds after which a name is looked up at its source again; as long is a "
                "caller's token taken without asking."),
        _option("--max-adapter-labels", type=_COUNT,
                help="Adapters that have series of their own in the metrics; the others are "
                "counted together."),
        _option("--max-adapter-rank", type=_COUNT, help="Largest rank of an adapter."),
        _option("--lora-backend", type=str, help="Adapter implementation of the shard."),
        _option("--disable-sgmv", type=SWITCH,
                help="Compute adapters with torch's own operations: --lora-backend cpu, where no "
                "other is named."),
    ],
    "Limits": [
        _option("--max-concurrent-requests", type=_COUNT,
                help="Requests in the server at once; more are answered 429. Those whose adapter "
                "is not on the shards yet are counted apart: as many may wait for each source, "
                "half as many for each adapter."),
        _option("--max-queued-requests", type=_COUNT,
                help="Requests that wait for their first step at once; more are answered 503 with "
                "the time after which to come back (default: no limit)."),
        _option("--max-queued-tokens", type=_COUNT,
                help="Tokens of these: of their prompts, and the most that they may generate "
                "(default: no limit)."),
        _option("--tenant-queued-requests", type=_COUNT,
                help="Of these, those of one tenant; more are answered 429 with the time after "
                "which to come back (default: no limit; with --api-keys-file half of what "
                "--max-queued-requests and --max-concurrent-requests allow). This and the flags "
                "that follow are for tenants of which the file says nothing else."),
        _option("--tenant-queued-tokens", type=_COUNT,
                help="Tokens of these (default: no limit; with --api-keys-file half of "
                "--max-queued-tokens)."),
        _option("--tenant-kv-share", type=_SHARE,
                help="Share of the KV cache that one tenant's requests and prefixes may hold while "
                "others want it (default: all of it)."),
        _option("--tenant-adapter-share", type=_SHARE,
                help="Share of the slots and of the memory for adapters that one tenant's may hold "
                "while others want it (default: all of it)."),
        _option("--tenant-concurrent-fetches", type=_COUNT,
                help="Adapters that are fetched for one tenant at the same time; more wait "
                "(default: no limit)."),
        _option("--max-best-of", type=_COUNT, help="Largest `best_of` of a request."),
        _option("--max-stop-sequences", type=click.IntRange(min=0),
                help="Most stop sequences of a request."),
        _option("--max-input-length", type=_COUNT,
                help="Longest prompt in tokens (default: one less than --max-total-tokens). A text "
                "with more characters than so many of the longest token is refused unread."),
        _option("--max-total-tokens", type=click.IntRange(min=2),
                help="Longest prompt plus output in tokens (default: the model's positions, at "
                "most 4096)."),
        _option("--max-body-bytes", type=_COUNT, help="Largest body of a request in bytes."),
        _option("--validation-workers", type=_COUNT, help="Threads that tokenize."),
    ],
    "Generation": [
        _option("--watermark-gamma", type=click.FloatRange(min=0.0, max=1.0),
                help="Share of the vocabulary that a `watermark` prefers after each token."),
        _option("--watermark-delta", type=click.FloatRange(min=-100.0, max=100.0),
                help="What a `watermark` adds to the logits of the preferred tokens."),
    ],
    "Scheduling": [
        _option("--max-batch-prefill-tokens", type=_COUNT,
                help="Tokens that one step may compute; longer prompts are computed in chunks "
                "(default: 512, of a model that generates nothing 1024)."),
        _option("--max-batch-total-tokens", type=_COUNT,
                help="Tokens that the KV cache may hold (default: all that fit)."),
        _option("--max-batch-size", type=_COUNT, help="Requests that run at once."),
        _option("--plan-depth", type=_COUNT,
                help="Steps planned ahead: 1 is lockstep, 2 overlaps host and device."),
        _option("--scheduling-policy", type=click.Choice(SCHEDULING_POLICIES),
                help="Who goes first: `fair` shares between tenants, then between each one's "
                "adapters; `fcfs` goes by arrival; `priority` by the class of request and key; "
                "`sjf` by expected length; `lorax` as LoRAX does (docs/scheduling.md)."),
        _option("--prefix-caching", type=click.BOOL, metavar="true|false",
                help="Keep what was computed of prompts and outputs, for requests of the same "
                "adapter that begin alike."),
        _option("--share-prefixes", type=SWITCH,
                help="Let tenants find what other tenants computed. How fast an answer begins "
                "then tells whether somebody asked the same."),
        _option("--record-events", type=click.Path(dir_okay=False),
                help="Record all that enters the scheduler into this file, from which "
                "`lorax-simulate --replay` makes its plans again. It holds no text and no token, but "
                "lengths, times, tenants, and which requests begin alike (docs/simulator.md)."),
        _option("--record-events-bytes", type=_COUNT,
                help="How large that file may become; then nothing more is recorded."),
        _option("--swap-space", type=click.FloatRange(min=0.0),
                help="GiB of host memory of each shard for KV of requests that give way: it comes "
                "back, instead of being computed again, where that is faster (default: 4 on a GPU; "
                "0 on a CPU, where it would be the same memory). 0: none."),
        _option("--swap-cached-blocks", type=click.BOOL, metavar="true|false",
                help="Keep in --swap-space, too, what the prefix cache has to let go."),
        _option("--speculative-tokens", type=click.IntRange(min=0),
                help="Tokens that are drafted for a request in a step, looked up in its own text, "
                "and checked with the next one: answers stay the same, and text that repeats itself "
                "comes faster. 0: none."),
        _option("--speculation-max-batch-size", type=_COUNT,
                help="Draft in steps of at most so many requests. Below that as much is drafted as "
                "pays, by what steps take and by how much was kept."),
        _option("--batching", type=click.Choice(BATCHINGS),
                help="How prompts and running requests share steps: `mixed` computes both in each "
                "one; `prefill` lets requests wait for their next token while there are prompts, "
                "`decode` prompts while requests run, each for a bounded number of steps "
                "(default: what --eager-prefill says, else mixed)."),
        _option("--eager-prefill", type=click.BOOL, metavar="true|false",
                help="LoRAX's name for two of them: `true` is --batching prefill, `false` is "
                "--batching decode."),
        _option("--target-itl-ms", type=click.FloatRange(min=0.0, min_open=True),
                help="Milliseconds that a step may take while requests wait for their next token: "
                "prompts are computed in chunks of the size that meets it, by what steps have "
                "taken so far (default: those that do not fit into a step take about as long as "
                "the tokens beside them, others are computed at once)."),
        _option("--max-batch-kv-read", type=_COUNT,
                help="Tokens in the KV cache that the requests of one step may attend to together; "
                "where they have more, they take turns (default: any number)."),
        _option("--max-partial-prompts", type=_COUNT,
                help="Prompts longer than a step that are computed at once, in at least half of "
                "what prompts get; shorter ones go past those that wait."),
        _option("--waiting-served-ratio", type=click.FloatRange(min=0.0),
                help="With --scheduling-policy lorax: requests enter once so many times those that "
                "run wait."),
        _option("--max-waiting-tokens", type=click.IntRange(min=0),
                help="With --scheduling-policy lorax: tokens of running requests after which "
                "others enter however few wait. With --batching decode: steps after which "
                "prompts have one."),
    ],
    "Network": [
        _option("--hostname", type=str, env=None, default=None, show_default=_DEFAULTS.hostname,
                help="Address to listen on; 0.0.0.0 lets other machines in. The variable HOSTNAME "
                "counts only if it is an IP address."),
        _option("-p", "--port", type=_PORT, help="Port of the HTTP server; 0: any free one."),
        _option("--admin-uds-path", type=click.Path(),
                help="Unix socket on which adapters are managed, for this user alone (default: in "
                "a private folder of the run; the ready line names it)."),
        _option("--admin-port", type=_PORT,
                help="Port of 127.0.0.1 on which adapters are managed, for everybody on this "
                "machine, but no browser or proxy (default: not served)."),
        _option("--grpc-port", type=_PORT,
                help="Port of the gRPC service lorax.v1, its health and reflection (default: not "
                "served)."),
        _option("--ingress-uri", metavar="unix:PATH|HOST:PORT",
                help="Where a `lorax-ingress` over several servers attaches to this one; whoever "
                "can is believed what it says of its callers (default: nowhere; docs/scaling.md)."),
        _option("--ingress-tls-dir", type=click.Path(file_okay=False),
                help="Folder with ca.pem, cert.pem and key.pem for that: each end shows a "
                "certificate of the authority. Needed beyond this machine."),
        _option("--max-connections", type=_COUNT,
                help="Open HTTP connections. Where there are as many, the one that has waited "
                "longest between requests makes room for a new one; if all are at work, the new "
                "one is answered 429."),
        _option("--http-workers", type=click.IntRange(0, 64),
                help="Processes that speak HTTP with clients for the router's, which goes on to "
                "decide and to count everything: requests, keys, dialects and events take other "
                "cores then. 0: the router's process does that itself."),
        _option("--client-timeout-s", type=click.FloatRange(min=0.0, min_open=True),
                help="Seconds that a client may take to send the head of a request, to go on with "
                "its body, or to go on reading an answer."),
        _option("--playground", type=SWITCH,
                help="Serve a page to try the server with, at /playground: docs/playground.md."),
        _option("--shard-uds-path", type=click.Path(),
                help="Sockets of the shards are this path, `-` and the rank (default: in a "
                "private folder of the run)."),
        _option("--master-addr", type=str,
                help="Where the shards find each other, by TCP: rank 0 listens there (default: a "
                "file in the run's private folder)."),
        _option("--master-port", type=_PORT,
                help="Port of `--master-addr` (default: 29500 if only that is given)."),
        _option("--shard-timeout", "shard_timeout_s",
                type=click.FloatRange(min=0.0, min_open=True),
                help="Seconds that a shard waits for the others within a step, before all of them "
                "end and the one that stood still is named."),
        _option("--step-timeout", "step_timeout_s",
                type=click.FloatRange(min=0.0, min_open=True),
                help="Seconds without an answer of the shards after which a step counts as lost."),
        _option("--start-timeout", "start_timeout_s", type=click.FloatRange(min=0.0, min_open=True),
                help="Seconds that shards and router get to become ready once the model is "
                "prepared."),
        _option("--restarts", type=click.IntRange(min=0),
                help="How often in a row processes that end are started again, before they have served "
                "for ten seconds: while shards are, requests wait and go on where they stood. 0: the "
                "server ends with the first."),
        _option("--grace-period", "grace_period_s", type=click.FloatRange(min=0.0),
                help="Seconds that running requests get to finish after SIGTERM."),
        _option("--cors-allow-origin", multiple=True, help="Origin whose pages in a browser may call; `*` is any (default: none)."),
        _option("--cors-allow-header", multiple=True, help="Header that browsers may send (default: any)."),
        _option("--cors-allow-method", multiple=True, help="Method that browsers may use."),
        _option("--cors-expose-header", multiple=True, help="Header that browsers may read."),
        _option("--cors-allow-credentials", type=SWITCH, help="Let browsers send credentials."),
    ],
    "Keys and TLS": [
        _option("--api-key", multiple=True, env=API_KEY_VARIABLES,
                help="A key that callers must present, as a Bearer token or as x-api-key; several "
                "with commas. Command lines can be seen by others on the machine: the variable or "
                "--api-keys-file is the better place."),
        _option("--api-keys-file", type=click.Path(dir_okay=False), env="LORAX_API_KEYS_FILE",
                help="A TOML or JSON file of tenants, with keys, rights and quotas of each; read "
                "again when it changes: docs/keys.md."),
        _option("--admin-api-key", multiple=True, env=ADMIN_KEY_VARIABLES,
                help="A key that also manages adapters where clients ask."),
        _option("--metrics-api-key", multiple=True, env=METRICS_KEY_VARIABLES,
                help="A key that reads /metrics and does nothing else."),
        _option("--metrics-port", type=_PORT,
                help="Port of --hostname that serves /metrics alone, without a key unless there "
                "is a --metrics-api-key (default: not served)."),
        _option("--ssl-certfile", type=click.Path(dir_okay=False),
                help="Certificate chain in PEM form, with the key or beside --ssl-keyfile: HTTP "
                "and gRPC then speak TLS. Read again when it changes."),
        _option("--ssl-keyfile", type=click.Path(dir_okay=False),
                help=f"Key of the certificate; its password, if it has one, is in "
                f"{SSL_PASSWORD_VARIABLE}."),
    ],
    "Output": [
        _option("--otlp-endpoint",
                help="Address of an OpenTelemetry collector, such as http://localhost:4317: requests "
                "are traced, by what pip installs as lorax-py[otel] (docs/tracing.md)."),
        _option("--log-level", type=LogLevel(), env=None, default=None,
                show_default=_DEFAULTS.log_level,
                help="Least level that is logged; LoRAX's `trace`, `warn` and `off` are known, in "
                "the variable LOG_LEVEL too."),
        _option("--json-output", type=SWITCH,
                help="Log JSON, one object a line; so does LOG_FORMAT=json."),
        _option("--download-only", type=SWITCH, help="Prepare the model and exit."),
        _option("-e", "--env", "show_env", type=SWITCH, env=None, default=False,
                help="Print versions and platform, and exit."),
    ],
}  # fmt: skip


def refused_options() -> list[click.Option]:
    """Return LoRAX's other options: parsed, so that they can be refused with a reason."""
    return [_refused(option) for option in REFUSED_OPTIONS]


def _repeated(args: Sequence[str]) -> Iterator[str]:
    """Put the flag that takes several values in front of each of them."""
    flag, num = "", 0
    for arg in args:
        if arg.startswith("-"):
            flag, num = arg if arg in _SEVERAL else "", 0
        elif flag:
            num += 1
            if num > 1:
                yield flag
        yield arg


def _refused(option: Refused) -> click.Option:
    switch = {"type": SWITCH, "is_flag": False, "flag_value": True, "default": False}
    return click.Option(
        [option.flag, option.name],
        envvar=option.envvar,
        hidden=True,
        **(switch if option.is_switch else {"type": str}),
    )


class GroupedCommand(click.Command):
    """A command whose help shows its options under headings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, where some flags take all values that follow them, as vLLM's do."""
        return super().parse_args(ctx, list(_repeated(args)))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group."""
        for title, options in OPTION_GROUPS.items():
            records = [option.get_help_record(ctx) for option in options]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])
