"""One module per op: argument checks, dispatch, fake kernel, gradient."""
