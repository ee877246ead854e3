"""Models on disk: each format in and out, side by side."""
