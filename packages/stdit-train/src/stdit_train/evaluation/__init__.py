"""Scores of a finished model."""
