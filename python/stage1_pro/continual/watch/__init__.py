"""What watches a served cascade, and whom it tells."""
