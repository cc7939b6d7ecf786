"""`stdit sample`: options, jobs, generation, files."""
