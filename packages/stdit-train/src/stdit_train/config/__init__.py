"""The settings of a run: their fields and bounds, TOML files, overrides."""
