"""Where runs happen: cluster profiles, and later the one-machine development cluster."""
