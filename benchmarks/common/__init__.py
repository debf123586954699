"""What the measurements share: synthetic checkpoints, and the memory of running processes."""
