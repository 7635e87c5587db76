"""A system whose model computes nothing: each step takes a fixed time. What is left is what serving costs."""
