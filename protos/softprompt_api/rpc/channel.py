"""Channels between services: message limits, keepalive, and retries before the first answer."""

import json
from collections.abc import Sequence

import grpc

from softprompt_api.rpc.tls import ClientTls

# No call may last longer: the most that a deadline can be set to.
MAX_CALL_S = 86_400
MAX_MESSAGE_BYTES = 8 * 2**20
CHUNK_BYTES = 2**20
# A tensor file of so many bytes is read sooner than it is asked for by itself.
SMALL_FILE_BYTES = 2**17

# Only UNAVAILABLE is retried, and only for calls that change nothing; gRPC never retries once an answer began.
_RETRIED = (
    [
        {"service": "softprompt_api.registry.v1.RegistryService", "method": method}
        for method in (
            "GetAdapter",
            "ListAdapters",
            "ListVersions",
            "ReadTensors",
            "ListBaseModels",
            "PutBaseModel",
        )
    ]
    + [{"service": "softprompt_api.registry.v1.KeyService", "method": method} for method in ("GetKey", "ListKeys")]
    + [
        {"service": "softprompt_api.inference.v1.InferenceService", "method": method}
        for method in (
            "Generate",
            "GenerateMany",
            "Tokenize",
            "Detokenize",
            "GetModel",
            "GetLoad",
            "ListResident",
            "NearestTokens",
        )
    ]
)
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": _RETRIED,
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)

CLIENT_OPTIONS: Sequence[tuple[str, int | str]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    # Shared with other channels, a connection that failed would keep a new one from a service that is back by now.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.service_config", _SERVICE_CONFIG),
)

SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.max_connection_age_ms", 3_600_000),
    # What still runs on an old connection is cut off then; it may have begun on a stream that was a minute old.
    ("grpc.max_connection_age_grace_ms", (MAX_CALL_S + 60) * 1000),
    # Two servers on one port would share its connections unseen.
    ("grpc.so_reuseport", 0),
)


# Without them, a sender learns how much it may send ahead of who reads, from how fast what it sends goes out.
_SHORT_WINDOW: Sequence[tuple[str, int]] = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**18))


def open_channel(target: str, tls: ClientTls | None = None, *, short_window: bool = False) -> grpc.aio.Channel:
    """An asyncio channel to a service at `host:port` or `unix:path`.

    Args:
        short_window: have the service wait with further messages of a stream until those before were read, but for
            some 256 KiB.
    """
    options = [*CLIENT_OPTIONS, *(_SHORT_WINDOW if short_window else ())]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, tls.grpc_credentials(), options=options)


def open_blocking_channel(target: str, tls: ClientTls | None = None) -> grpc.Channel:
    """A blocking channel to a service, for scripts and the command line."""
    options = list(CLIENT_OPTIONS)
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, tls.grpc_credentials(), options=options)
