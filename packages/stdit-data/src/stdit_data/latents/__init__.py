"""The cache of encoded clips and captions; `format.py` describes its files."""
