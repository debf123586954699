"""What tests of several rooms share: models of any era, real ranks, the command line, paths."""
