"""The inference service: a gRPC front, and an engine in a process of its own that computes one batch at a time."""

import os

# Read by OpenMP when torch is first imported, and every way to torch leads through this package. Threads that wait
# by spinning take the cores from the servers and from each other: on two cores with one busy neighbour, a decode
# step took 10 to 20 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
