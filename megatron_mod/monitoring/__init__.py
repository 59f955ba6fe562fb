"""What one sees of a training: its records, where they go, and how it was started."""
