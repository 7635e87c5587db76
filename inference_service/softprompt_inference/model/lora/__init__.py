"""LoRA over a loaded model: found linears, their weights by slot, and what a step adds to each."""
