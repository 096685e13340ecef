"""Where runs are executed: profiles of machines and clusters."""
