"""`python -m softprompt_api.rpc.probe HOST:PORT`: exit 0 when the service there says SERVING, 1 otherwise.

It reads `SOFTPROMPT_TLS_CA`, `SOFTPROMPT_TLS_CLIENT_CERT` and `SOFTPROMPT_TLS_CLIENT_KEY`, as the services do.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2

from softprompt_api.rpc.channel import open_blocking_channel
from softprompt_api.rpc.tls import ClientTls
from softprompt_api.settings import ClientTlsSettings, SettingsError, read


def check_of(
    channel: grpc.Channel,
) -> "grpc.UnaryUnaryMultiCallable[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]":
    """The health service's `Check`."""
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


def is_serving(target: str, timeout_s: float = 3.0, tls: ClientTls | None = None) -> bool:
    """Whether the health service at `target` answers SERVING within the time."""
    with open_blocking_channel(target, tls) as channel:
        try:
            answer = check_of(channel)(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> int:
    """Probe what the command line names; the exit status."""
    if len(sys.argv) != 2:
        print("usage: python -m softprompt_api.rpc.probe HOST:PORT", file=sys.stderr)
        return 1
    try:
        tls = read(ClientTlsSettings).client_tls
    except SettingsError as error:
        print(f"probe: {error}", file=sys.stderr)
        return 1
    return 0 if is_serving(sys.argv[1], tls=tls) else 1


if __name__ == "__main__":
    sys.exit(main())
