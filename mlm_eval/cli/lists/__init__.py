"""What there is to choose from.

    names.py   names by their kind, also those that an option of a command takes
    ls.py      ls: prints them
    data.py    data: the files that the tasks want, and whether yours are those

`command.py` takes names from here for its help and for completions.
"""
