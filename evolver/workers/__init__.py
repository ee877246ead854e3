"""What evaluates candidates, with or without Ray: a worker, its plan, and pools of workers here and elsewhere."""
