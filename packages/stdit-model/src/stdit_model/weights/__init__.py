"""Checkpoint files of any known layout, read strictly into a model."""
