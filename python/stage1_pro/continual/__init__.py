"""Continuous learning: what was served and judged, what watches it, what proposes better, and what may replace it."""
