"""The dashboard: it shows the runs of a results folder in a browser, also while they run."""
