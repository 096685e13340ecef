"""From runs to jobs that are started, and the records of it."""
