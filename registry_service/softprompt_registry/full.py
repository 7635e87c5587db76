"""What is written even where the store is full: what frees memory, or takes next to none.

A full store refuses whatever may take memory: deletions too, since they count and tell what they have done. It
grants it to scripts that say that they may (Redis from 7.0, Valkey).
"""

from typing import Any

from redis.asyncio import Redis

SCRIPT_HEAD = "#!lua flags=allow-oom\n"
_DO = f"{SCRIPT_HEAD}return redis.call(unpack(ARGV))"


def also_when_full(client: Redis, command: str, key: str, *arguments: Any) -> Any:
    """Do a command on one key, or queue it where the client is a pipeline."""
    return client.eval(_DO, 1, key, command, key, *arguments)
