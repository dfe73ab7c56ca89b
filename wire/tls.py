"""TLS to the broker: settings and the context that they describe."""

from __future__ import annotations

import ssl

from wire.credentials import secret_path
from wire.errors import ConfigError
from wire.settings import Settings


class TlsSettings(Settings, frozen=True, kw_only=True):
    """TLS to the broker; ``cert`` and ``key`` identify us where the broker demands it.

    Each is a path or ``credential:NAME``.
    """

    ca: str
    cert: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key is not None and self.cert is None:
            raise ValueError("expected cert beside key")


def build_tls_context(tls: TlsSettings) -> ssl.SSLContext:
    """Raises ConfigError where a file cannot be read or used."""
    ca, cert, key = (
        None if value is None else secret_path(value, field=f"$.mqtt.tls.{name}")
        for name, value in (("ca", tls.ca), ("cert", tls.cert), ("key", tls.key))
    )
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"expected readable PEM files for ca, cert and key ({exc})", field="$.mqtt.tls"
        ) from exc
    return context
