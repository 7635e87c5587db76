"""Admin routes: register, list, describe and delete adapters."""
