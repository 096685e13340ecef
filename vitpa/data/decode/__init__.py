"""From the bytes of a JPEG to pixels."""
