"""Faster stand-ins for parts of a loaded model, found by structure and verified by numbers, not by model name."""
