"""Run shards of work that are independent of each other: here, in several processes, or on a Ray cluster."""
