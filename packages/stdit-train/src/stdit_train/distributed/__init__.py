"""Training on several processes: world, mesh, sharding (`parallelize.py` wraps with FSDP2), launch."""
