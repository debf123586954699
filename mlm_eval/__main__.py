"""Run the command line as `python -m mlm_eval`."""

from mlm_eval.cli import entry

# The guard is for the ranks: a spawned process imports this file again under another name.
if __name__ == "__main__":
    entry()
