"""Numbers as people write them in options: 0.1, 1e-3, 8/255."""


def parse(text: str) -> float:
    """Read a number or a fraction of two numbers.

    Args:
        text: Such as `0.1` or `8/255`.

    Raises:
        ValueError: If it is neither, or the denominator is 0.
    """
    numerator, slash, denominator = text.partition("/")
    if not slash:
        return float(text)
    if float(denominator) == 0:
        raise ValueError(f"division by 0 in {text!r}")
    return float(numerator) / float(denominator)
