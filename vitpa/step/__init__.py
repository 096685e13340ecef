"""One optimiser step of one or several replicas."""
