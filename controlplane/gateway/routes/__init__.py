"""HTTP routes, a file per family."""
