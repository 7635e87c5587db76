"""The inference service: a gRPC front, and an engine in a process of its own that computes one batch at a time."""

import os

# Read by OpenMP when torch is first imported, and every way to torch leads through this package. Threads that wait
# by spinning take the cores from the servers and from each other; docs/performance.md has what was measured.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
