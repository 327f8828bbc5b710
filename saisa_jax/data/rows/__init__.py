"""Which samples are in which row, and reading them: order of an epoch -> packing -> rows."""
