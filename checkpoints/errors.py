"""The one error that is the user's to mend."""


class InputError(ValueError):
    """A file, an option or a value given by the user is wrong.

    The message is one sentence: it names the file or the option, what was found, what was
    expected and what to do. The command line prints it without a traceback and exits with 2.
    Any other ValueError comes from a library, and is a bug of ours.
    """
