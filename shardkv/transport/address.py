"""Addresses as people write them: HOST:PORT, with [..] around an IPv6 host."""

from __future__ import annotations

import ipaddress
import os
import socket

from shardkv.errors import InvalidArgument

Address = tuple[str, int]


def parse_address(text: str) -> Address:
    """(host, port) of "HOST:PORT". Raises InvalidArgument."""
    host, colon, port = text.strip().rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else -1
    if not colon or not host or "/" in host or not 0 <= number <= 65535:
        raise InvalidArgument(f"{text!r} is not an address.", hint="Write HOST:PORT, for example 127.0.0.1:7400.")
    return host.removeprefix("[").removesuffix("]"), number


def format_address(host: str, port: int) -> str:
    """The inverse of `parse_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def problem_of(error: Exception) -> str:
    """Why an address could not be used, in the system's words, without a full stop."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")
