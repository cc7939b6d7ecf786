"""Everything that changes the weights: optimizers, EMA, precision."""
