"""What runs inside a job, or a worker of this machine."""
