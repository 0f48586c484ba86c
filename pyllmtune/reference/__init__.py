"""One module per op: the specification in eager torch."""
