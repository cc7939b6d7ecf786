"""The commands, one file each: options on top, heavy imports inside the functions."""
