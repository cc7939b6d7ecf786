"""The `stdit` command."""
