"""The sweep: grid -> runs -> submission -> status -> collected table."""
