"""Memory, FLOPs and traffic of a run before anything is allocated."""
