"""`vitpa doctor`: whether a place is fit, and how to fix it."""
