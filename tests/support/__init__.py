"""What tests of several rooms share. Tests import from here, never from each other.

    configs  random_models  tiny_bert  huggingface_models
                            small models, and a tokenizer; every weight is noise
    ranks  command_line  command_line_fixtures
                            real ranks over gloo, and the command line as a user runs it
    rounding  properties    how to compare: within rounding, on many examples
    processes  paths        which tests start processes, where things are
    folders/                small checkpoints and data as folders, of every era, format and family
    runs/                   what ranks and engines are made to run, and how it is watched
    fuzz/                   random models; megatron-core in a process of its own, which reads what
                            we write, and writes random models for us to read
    reliability/            hostile and broken input: a warm process, what commands may not do
    house/                  the rules of the house, the built wheel, other processors

Nothing here is a test.
"""

# A module is found without its room, too.
_ROOMS = ("folders", "fuzz", "house", "reliability", "runs")
__path__ = [*__path__, *(f"{__path__[0]}/{room}" for room in _ROOMS)]
