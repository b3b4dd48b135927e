"""Serving that remembers: events, logged decisions, and a cascade that follows the loop."""
