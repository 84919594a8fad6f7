"""The keys that a configuration names."""

from __future__ import annotations

from lorax_contract.config import ConfigError, RouterConfig
from lorax_contract.errors import StartupError
from lorax_contract.exit_codes import ExitCode
from lorax_router.service.keys.store import KeyStore


def key_store(config: RouterConfig) -> KeyStore:
    """Read the keys; raises StartupError, which names none."""
    try:
        return KeyStore(
            api_keys=config.api_key_hashes,
            admin_keys=config.admin_key_hashes,
            metrics_keys=config.metrics_key_hashes,
            path=config.api_keys_file,
        )
    except ConfigError as error:
        raise StartupError(str(error), ExitCode.BAD_CONFIG) from error
