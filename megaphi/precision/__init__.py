"""Number formats of the compute."""
