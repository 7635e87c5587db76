"""The cases. Each module has `run(bench)`, and `expected_turns(size, num_peers)` for the time that is left."""
