"""The one error of this project that is the user's."""


class InputError(ValueError):
    """A file, an option or a value given by the user is wrong.

    The message is one sentence: it names the file or the option, what was found, what was
    expected and what to do. The command line prints it without a traceback and exits with 2.
    A ValueError that is not an InputError came from a library and is a fault of ours.
    """
