"""`python -m softprompt_api.rpc.probe HOST:PORT`: exit 0 when the service there says SERVING, 1 otherwise."""

import sys

import grpc
from grpc_health.v1 import health_pb2

from softprompt_api.rpc.channel import open_blocking_channel


def is_serving(target: str, timeout_s: float = 3.0) -> bool:
    """Whether the health service at `target` answers SERVING within the time."""
    check = open_blocking_channel(target).unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        answer = check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m softprompt_api.rpc.probe HOST:PORT")
    sys.exit(0 if is_serving(sys.argv[1]) else 1)
