"""`python -m benchmarks.stub.inference`: the inference service over the stub engine; otherwise the real one."""

from softprompt_inference import __main__ as service
from softprompt_inference.engine import client


def main() -> None:
    """Serve like `python -m softprompt_inference`."""
    client.ENGINE_MODULE = "benchmarks.stub.engine"
    service.main()


if __name__ == "__main__":
    main()
