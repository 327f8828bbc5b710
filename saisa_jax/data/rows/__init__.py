"""Which samples stand in which row, and reading those: order of an epoch -> packing -> rows."""
