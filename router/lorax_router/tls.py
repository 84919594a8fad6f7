"""The certificate that clients see, over HTTP and gRPC: read again when its files change."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from lorax_contract.config import ConfigError, RouterConfig
from lorax_contract.keys import SSL_PASSWORD_VARIABLE
from lorax_router.service.keys.watch import FileWatch

logger = logging.getLogger(__name__)


class TlsIdentity:
    """A certificate with its key; raises ConfigError for files that are none.

    Args:
        certfile: the chain, and the key unless ``keyfile`` names its file.
        password: of the key; None: it has none.
    """

    def __init__(self, certfile: str, keyfile: str | None, password: str | None = None) -> None:
        self._certfile = certfile
        self._keyfile = keyfile
        self._password = password
        paths = [certfile] if keyfile is None else [certfile, keyfile]
        self._watch = FileWatch(paths, self._read_again)
        # Connections that begin after a change get the new certificate from the same context.
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load(self.context)
        # How often the files were read.
        self.version = 1

    @classmethod
    def of(
        cls, config: RouterConfig, environment: Mapping[str, str] = os.environ
    ) -> TlsIdentity | None:
        """Return what a configuration asks for; None: plain text."""
        if config.ssl_certfile is None:
            return None
        password = environment.get(SSL_PASSWORD_VARIABLE) or None
        return cls(config.ssl_certfile, config.ssl_keyfile, password)

    @property
    def pem(self) -> tuple[bytes, bytes]:
        """The key and the chain as they are in the files, for gRPC; raises OSError."""
        chain = Path(self._certfile).read_bytes()
        return Path(self._keyfile or self._certfile).read_bytes(), chain

    @property
    def has_password(self) -> bool:
        """Whether the key is encrypted."""
        return self._password is not None

    def check(self) -> None:
        """Read the files again if they have changed."""
        self._watch.check()

    async def follow(self) -> None:
        """Read the files again whenever they change, until cancelled."""
        await self._watch.follow()

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            # A function, as without one OpenSSL would ask at the terminal.
            context.load_cert_chain(
                self._certfile, self._keyfile, password=lambda: self._password or ""
            )
        except ssl.SSLError as error:
            raise ConfigError(
                "ssl_certfile: certificate and key cannot be read or do not belong together "
                f"({error.reason or 'no reason given'}); if the key has a password, "
                f"{SSL_PASSWORD_VARIABLE} must hold it"
            ) from None
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"ssl_certfile: certificate or key cannot be read: {why}") from None

    def _read_again(self) -> None:
        try:
            # First where no harm is done: a key that does not fit would break the context.
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except ConfigError as error:
            logger.error("the certificate stays as it was: %s", error)
        else:
            self.version += 1
            logger.info("the certificate was read again")
