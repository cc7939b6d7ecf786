"""Lists of clips: read, complete, validate and split them."""
