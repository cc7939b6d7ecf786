"""From a data set to batches: order, read-ahead and resumption."""
