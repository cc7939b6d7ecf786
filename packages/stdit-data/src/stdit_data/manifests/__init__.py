"""Lists of clips: read, complete, check, split, and convert from data sets."""
