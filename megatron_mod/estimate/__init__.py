"""What a training will need of machines, computed before there are any."""
