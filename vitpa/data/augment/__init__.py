"""What happens to training images, drawn per image."""
