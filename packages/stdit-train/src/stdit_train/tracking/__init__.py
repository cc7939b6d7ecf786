"""Numbers recorded along a run: metrics, throughput, profiles."""
