"""What is shown of a sweep: status, logs, tables."""
