"""Sockets: unix ones, and certificates that cannot be used."""

import socket
import stat
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI
from tests.unit.server.conftest import serving

from tokenmill.errors import ConfigError
from tokenmill.server.app import Server
from tokenmill.server.config import ServerConfig
from tokenmill.server.connections.listener import bind


async def test_a_unix_socket_serves_owner_and_group_and_is_removed(app: FastAPI, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with serving(app, ServerConfig(uds=str(path))) as address:
        assert address == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        transport = httpx2.AsyncHTTPTransport(uds=str(path))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as http:
            assert (await http.get("/v1/models")).json()["data"][0]["id"] == "scripted"
    assert not path.exists()


def test_a_socket_that_a_killed_server_left_is_replaced(tmp_path: Path) -> None:
    config = ServerConfig(uds=str(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(config.uds)
    with bind(config), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(config.uds)


@pytest.mark.parametrize("kind", ["socket in use", "file", "folder is missing"])
def test_what_is_in_the_way_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "missing" / "socket" if kind == "folder is missing" else tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        if kind == "socket in use":
            other.bind(str(path))
            other.listen()
        elif kind == "file":
            path.write_text("precious")
        with pytest.raises(ConfigError) as caught, bind(ServerConfig(uds=str(path))):
            pass
    assert (caught.value.code, caught.value.field) == ("address_unavailable", "uds")
    assert path.exists() == (kind != "folder is missing")


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ({"tls_key": "key.pem"}, "tls_incomplete", "tls_key"),
        ({"tls_client_ca": "ca.pem"}, "tls_incomplete", "tls_client_ca"),
        ({"tls_cert": "/no/such/file.pem"}, "tls_unusable", "tls_cert"),
        ({"tls_cert": __file__}, "tls_unusable", "tls_cert"),
    ],
)
def test_certificates_that_cannot_be_used(app: FastAPI, options: dict[str, str], code: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Server(app, ServerConfig(**options))
    assert (caught.value.code, caught.value.field) == (code, field)
