"""Reading, augmenting and batching images."""
