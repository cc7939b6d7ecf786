"""From a batch to the loss."""
