"""API keys: what is kept of one, which texts can be one, and the variables that hold some."""

from __future__ import annotations

import hashlib

from lorax_contract.config import ConfigError
from lorax_contract.words import counted

# Of keys for clients, for admins, for the metrics; the first one that is set counts.
API_KEY_VARIABLES = ("LORAX_API_KEY", "API_KEY")
ADMIN_KEY_VARIABLES = ("LORAX_ADMIN_API_KEY", "ADMIN_API_KEY")
METRICS_KEY_VARIABLES = ("LORAX_METRICS_API_KEY", "METRICS_API_KEY")
# Holds the password of the TLS key's file; no flag does, as flags can be seen.
SSL_PASSWORD_VARIABLE = "LORAX_SSL_KEYFILE_PASSWORD"  # noqa: S105 a variable's name

_LEAST_CHARS = 8


def hash_of(key: str) -> str:
    """Return what is kept of a key: keys are random, so no slow hash has to protect them."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def check_key(key: str, what: str) -> None:
    """Raise ConfigError, without the text itself, for one that cannot be sent or is soon guessed."""
    if len(key) < _LEAST_CHARS:
        least = counted(_LEAST_CHARS, "character")
        raise ConfigError(f"{what} is too short: a key has at least {least}")
    if not all("!" <= char <= "~" for char in key):
        raise ConfigError(f"{what} has a space or a character that is not printable ASCII")
