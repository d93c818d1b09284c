"""Words that depend on a number."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2 images".

    Args:
        number:
            How many there are.
        noun:
            What they are, in the singular; the plural has an s more.
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def are(number: int) -> str:
    """The verb of so many: "is" or "are"."""
    return "is" if number == 1 else "are"
