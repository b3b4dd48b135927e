"""Studies: comparisons over seeds, simulations of the loop, and measurements of anybody's predictions."""
