"""What a routed model is worth: quality, capacity and speed beside the dense model."""
