"""The socket that the server listens on: TCP or unix, plain or TLS."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from tokenmill.errors import ConfigError
from tokenmill.server.config import ServerConfig

__all__ = ["address_of", "bind", "load_tls", "tls_options"]

_UMASK = 0o117
"""Leaves a unix socket to its owner and group."""


@contextlib.contextmanager
def bind(config: ServerConfig) -> Iterator[socket.socket]:
    """A socket that listens: whoever connects waits until the server is there.

    Raises:
        ConfigError: ``address_unavailable``.
    """
    with _bind_unix(Path(config.uds)) if config.uds else _bind_tcp(config) as listener:
        try:
            yield listener
        finally:
            if config.uds:
                Path(config.uds).unlink(missing_ok=True)


def address_of(config: ServerConfig, listener: socket.socket) -> str:
    """Where clients reach it."""
    if config.uds:
        return f"unix:{config.uds}"
    host, port = listener.getsockname()[:2]
    return f"{'https' if config.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _bind_tcp(config: ServerConfig) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            "address_unavailable", f"Cannot listen on {config.host}:{config.port}: {error.strerror}.", "port"
        ) from None
    return listener


def _bind_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(_UMASK)
    try:
        _remove_stale(path)
        listener.bind(str(path))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConfigError(
            "address_unavailable", f"Cannot listen on {path}: {error.strerror or error}.", "uds"
        ) from None
    finally:
        os.umask(before)
    return listener


def _remove_stale(path: Path) -> None:
    """Removes the socket that a server left behind which was killed; not one that is in use, nor any other file."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()


def tls_options(config: ServerConfig) -> dict[str, Any]:
    """Arguments for uvicorn.

    Raises:
        ConfigError: ``tls_incomplete``.
    """
    if not config.tls_cert:
        for field in ("tls_key", "tls_client_ca"):
            if getattr(config, field):
                raise ConfigError("tls_incomplete", f"{field} needs tls_cert.", field)
        return {}
    return {
        "ssl_certfile": config.tls_cert,
        "ssl_keyfile": config.tls_key or None,
        "ssl_ca_certs": config.tls_client_ca or None,
        "ssl_cert_reqs": ssl.CERT_REQUIRED if config.tls_client_ca else ssl.CERT_NONE,
    }


def load_tls(uvicorn_config: uvicorn.Config) -> None:
    """Reads the certificates, before anything else is begun.

    Raises:
        ConfigError: ``tls_unusable``.
    """
    try:
        uvicorn_config.load()
    except OSError as error:  # ssl.SSLError is one
        files = (uvicorn_config.ssl_certfile, uvicorn_config.ssl_keyfile, uvicorn_config.ssl_ca_certs)
        names = ", ".join(str(file) for file in files if file)
        raise ConfigError("tls_unusable", f"{names}: {error.strerror or error}.", "tls_cert") from None
