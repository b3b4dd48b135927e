"""The loop: its states, its work and what may be promoted."""
