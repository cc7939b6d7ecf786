"""From a batch to the loss; the objectives' formulas and targets are in `stdit_model.diffusion`."""
