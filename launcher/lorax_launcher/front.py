"""What clients meet: addresses, keys, certificates, pages of other origins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorax_contract.config import ConfigError
from lorax_contract.keys import (
    ADMIN_KEY_VARIABLES,
    API_KEY_VARIABLES,
    METRICS_KEY_VARIABLES,
    check_key,
    hash_of,
)
from lorax_launcher.options import LauncherOptions, UsageError

# No child gets a key: the router gets hashes, in its configuration.
KEY_VARIABLES = (*API_KEY_VARIABLES, *ADMIN_KEY_VARIABLES, *METRICS_KEY_VARIABLES)


def front_settings(options: LauncherOptions) -> dict[str, Any]:
    """Return the router's settings of keys, TLS, the playground and CORS."""
    return {
        "api_key_hashes": _key_hashes("--api-key", options.api_key),
        "admin_key_hashes": _key_hashes("--admin-api-key", options.admin_api_key),
        "metrics_key_hashes": _key_hashes("--metrics-api-key", options.metrics_api_key),
        "api_keys_file": absolute(options.api_keys_file),
        "metrics_port": options.metrics_port,
        "ssl_certfile": absolute(options.ssl_certfile),
        "ssl_keyfile": absolute(options.ssl_keyfile),
        "playground": options.playground,
        "cors_allow_origin": list(options.cors_allow_origin),
        "cors_allow_header": list(options.cors_allow_header),
        "cors_allow_method": list(options.cors_allow_method),
        "cors_expose_header": list(options.cors_expose_header),
        "cors_allow_credentials": options.cors_allow_credentials,
    }


def check_network(options: LauncherOptions) -> None:
    """Raise UsageError for addresses and origins that contradict each other."""
    ports = [options.port, options.grpc_port, options.admin_port, options.metrics_port]
    given = [port for port in ports if port]
    if len(set(given)) < len(given):
        raise UsageError(
            "--port, --grpc-port, --admin-port and --metrics-port must differ from each other."
        )
    if options.cors_allow_credentials and "*" in options.cors_allow_origin:
        raise UsageError(
            "--cors-allow-credentials cannot be had with --cors-allow-origin *: any page could act "
            "for whoever looks at it; name the origins."
        )


def useless_cors(options: LauncherOptions) -> list[str]:
    """Name the options of CORS that do nothing as no origin may call."""
    if options.cors_allow_origin:
        return []
    names = ("cors_allow_header", "cors_allow_method", "cors_expose_header")
    given = [name for name in (*names, "cors_allow_credentials") if getattr(options, name)]
    return [
        f"--{name.replace('_', '-')} has no effect without --cors-allow-origin" for name in given
    ]


def _key_hashes(flag: str, values: Sequence[str]) -> list[str]:
    """Return the hashes of a flag's keys: the keys themselves go no further than this."""
    keys = [key.strip() for value in values for key in value.split(",") if key.strip()]
    for place, key in enumerate(keys, 1):
        try:
            check_key(key, f"{flag}: key {place}")
        except ConfigError as error:
            raise UsageError(f"{error}.") from None
    return list(dict.fromkeys(map(hash_of, keys)))


def absolute(path: str | None) -> str | None:
    """Return a path that holds whatever folder a child runs in."""
    return None if path is None else str(Path(path).absolute())
