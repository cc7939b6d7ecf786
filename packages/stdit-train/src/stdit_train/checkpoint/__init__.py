"""A run on disk: its folder, its checkpoints (`format.py` lists what a resume reads), its initial weights."""
