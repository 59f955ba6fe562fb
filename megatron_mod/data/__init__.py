"""From text files to the batches of a step."""
