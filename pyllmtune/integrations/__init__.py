"""Other projects on our ops: the only files that know those projects' names."""
