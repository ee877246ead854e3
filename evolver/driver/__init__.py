"""What puts the parts together: a run from its configuration to its report, its exported models and their cards."""
