"""Building the bundled demo model."""
