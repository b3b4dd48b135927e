"""Room: deploy."""
