"""From a data set to batches: order, read-ahead, resume."""
