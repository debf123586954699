"""What ranks and engines are made to run, and how it is watched."""
