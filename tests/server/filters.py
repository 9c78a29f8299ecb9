"""Output filters for test_output_filter.py; imported by name, as a user's would be."""

from octavo.output_filter import Keep, Replace, Stop


def mask(text, last):
    return Replace(text.replace("secret", "******")) if "secret" in text else Keep()


def cut(text, last):
    before, found, _ = text.partition("secret")
    return Stop(before) if found else Keep()


def broken(text, last):
    if "secret" in text:
        raise RuntimeError("a bug")
    return Keep()


mask.hold_back = cut.hold_back = broken.hold_back = 6
