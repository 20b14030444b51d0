"""An address to listen at, or one clear error."""

import socket

from .errors import ConfigError


def listening(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address of this machine; port 0 takes a free one.

    Raises:
        ConfigError: there is no such address here, or it is taken.

    >>> with listening("127.0.0.1", 0) as bound:
    ...     listening("127.0.0.1", bound.getsockname()[1])
    Traceback (most recent call last):
    new_llm.errors.ConfigError: a free address expected, 127.0.0.1 port ... cannot be used (...
    """
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen()
    except (OSError, OverflowError) as error:
        bound.close()
        raise ConfigError(
            f"a free address expected, {host} port {port} cannot be used ({error}); "
            "choose another --port or --host"
        ) from None
    return bound
