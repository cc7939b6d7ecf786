"""From a prompt to frames: the pipeline and everything that only sampling needs."""
