"""Between a run and a sampling pipeline: load, save, export."""
