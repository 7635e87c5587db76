"""Adapters on their way from the registry to the engine: fetched once, kept in memory, resident while used."""
