"""The cache of encoded clips and captions: write, read, shuffle and merge it."""
