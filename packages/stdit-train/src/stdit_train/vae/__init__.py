"""Training a VAE by itself: networks, losses, and the task that `Trainer` carries out."""
