"""The exam's own modules are found by their short names."""
