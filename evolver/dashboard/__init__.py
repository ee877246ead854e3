"""The dashboard: runs of a results folder in a browser, as they are and as they go."""
