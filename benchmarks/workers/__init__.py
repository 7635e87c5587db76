"""Programs that run one side each, some of them in an environment that holds nothing of ours but `benchmarks`."""
