"""Benchmarks against PEFT, transformers and vLLM: `python -m benchmarks`. Not part of what is installed."""
