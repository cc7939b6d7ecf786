"""`stdit serve`: a page in the browser that makes videos from prompts."""
