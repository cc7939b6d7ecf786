"""The data sets of a run, as its settings describe them."""
