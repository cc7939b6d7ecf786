"""The cache of encoded clips and captions."""
