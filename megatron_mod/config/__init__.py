"""A run's settings: their schema, the command line and what is refused."""
