"""The adapter registry service: `python -m softprompt_registry`."""
