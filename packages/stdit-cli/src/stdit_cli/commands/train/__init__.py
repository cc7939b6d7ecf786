"""`stdit train`: options, the run, its estimate."""
