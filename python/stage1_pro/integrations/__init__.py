"""Doors to other people's programs; the base install is enough for each."""
