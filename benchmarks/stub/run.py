"""`python -m benchmarks.stub.run run MODEL …`: `softprompt run` with the stub inference service in its place."""

from softprompt.cli import main, services

INFERENCE = "benchmarks.stub.inference"

if __name__ == "__main__":
    services.MODULES = {**services.MODULES, "inference": INFERENCE}
    main()
