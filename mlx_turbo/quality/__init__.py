"""What compression costs in quality."""
