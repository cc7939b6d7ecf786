"""A causal video VAE that starts from an image VAE."""
