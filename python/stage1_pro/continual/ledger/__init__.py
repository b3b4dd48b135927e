"""What was judged: store, labels, review, guard and audit."""
