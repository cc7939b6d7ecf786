"""The address to listen on. No heavy imports."""

import errno
import ipaddress
import socket

from stdit_train.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address, before anything is loaded.

    Args:
        host: a name or an address of this machine.
        port: 0 for a free one.

    Raises:
        ConfigError: the port is taken or not allowed, or the host is not this machine.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(place[:2], family=family)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: no such address; 127.0.0.1 is this machine alone") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is taken: stop what listens there, or choose another port") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ConfigError(f"--port {port} is not allowed: choose one from 1024 on") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(f"--host {host} is not an address of this machine") from error
        raise


def shown(listener: socket.socket, host: str) -> str:
    """Return the URL at which a browser of this machine finds the page."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{listener.getsockname()[1]}"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
