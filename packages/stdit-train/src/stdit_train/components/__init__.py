"""The frozen VAE and text encoder: load, identify and precompute their outputs."""
