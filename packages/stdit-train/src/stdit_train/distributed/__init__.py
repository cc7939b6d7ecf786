"""Training on many processes: world, mesh, sharding, launch."""
