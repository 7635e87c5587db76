"""The inference service: a gRPC front, and an engine in a process of its own that computes one batch at a time."""

import os

# Read by OpenMP when torch is first imported; every way to torch leads through this package. A thread that waits
# spins for some tens of microseconds, about the pause between two products of a step, and then sleeps: spinning
# on, it would take the cores from the servers and from each other. docs/performance.md has what was measured.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "5000"
