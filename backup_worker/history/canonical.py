"""One way to write a JSON value, so that its hash is the same whoever computes it, in any language: RFC 8785.

Raises `ValueError` or `OverflowError` for what JSON cannot hold: NaN, infinities, half a surrogate pair.
"""

from __future__ import annotations

import json
from typing import Any


def canonical(value: Any) -> str:
    """Return `value` as RFC 8785 writes it: one form for one meaning, whoever computes the hash, in any language."""
    if isinstance(value, dict):
        ordered = sorted(value.items(), key=lambda item: item[0].encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(key)}:{canonical(item)}" for key, item in ordered) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(item) for item in value) + "]"
    if isinstance(value, float):
        return _number(value)
    return json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """Write a float as ECMAScript does."""
    if value == int(value) and abs(value) < 2**53:
        return str(int(value))
    digits = repr(value)
    mantissa, _, exponent = digits.partition("e")
    power = int(exponent or 0)
    sign, mantissa = ("-", mantissa[1:]) if mantissa.startswith("-") else ("", mantissa)
    if not exponent:
        return sign + mantissa.removesuffix(".0")
    whole = mantissa.replace(".", "")
    if -7 < power < 0:
        return f"{sign}0.{'0' * (-power - 1)}{whole}"
    if 0 < power < 21:
        return sign + whole.removesuffix("0" if mantissa.endswith(".0") else "").ljust(power + 1, "0")
    return f"{sign}{mantissa}e{'+' if power > 0 else '-'}{abs(power)}"
