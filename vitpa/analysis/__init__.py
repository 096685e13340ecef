"""What a trained network has learned of the spatial structure."""
