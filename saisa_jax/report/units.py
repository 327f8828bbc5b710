"""Numbers formatted for people."""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = "\N{EN DASH}"  # for what is not known


def percent(share: float | None) -> str:
    """0.9483 -> "94.8%"."""
    return NOTHING if share is None else f"{share:.1%}"


def change(share: float) -> str:
    """-0.56 -> "-56%", with a real minus sign."""
    return f"{share:+.0%}".replace("-", "\N{MINUS SIGN}")


def interval(bounds: Sequence[float]) -> str:
    """(0.941, 0.954) -> "94.1 to 95.4"."""
    low, high = bounds
    return f"{100 * low:.1f} to {100 * high:.1f}"


def flops(number: float | None) -> str:
    """42134000 -> "42.1 MFLOPs"."""
    return NOTHING if number is None else f"{scaled(number)}FLOPs"


def scaled(number: float) -> str:
    """Three digits and the prefix of a thousand's power: 1661952 -> "1.66 M"; what is below 1000 has none."""
    size, prefix = thousands(number)
    value = number / size
    digits = max(0, 2 - (value >= 9.995) - (value >= 99.95)) if prefix else 0
    return f"{value:.{digits}f} {prefix}"


def thousands(number: float) -> tuple[float, str]:
    """The power of a thousand to write a number in, and its prefix: 1661952 -> (1e6, "M")."""
    sizes = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next(((size, prefix) for size, prefix in sizes if number / size >= 0.9995), (1.0, ""))


def duration(seconds: float | None) -> str:
    """502 -> "8 min 22 s", and from ten minutes on without seconds."""
    if seconds is None:
        return NOTHING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole < 600 else f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
