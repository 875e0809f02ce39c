"""Text that every database takes, and that is therefore the same before and after it was stored."""


def clean(text: str) -> str:
    """The text with U+FFFD for each NUL and lone surrogate."""
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
