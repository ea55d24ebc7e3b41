"""Scripts that measure what the package costs; each prints its results as JSON in its last line."""
