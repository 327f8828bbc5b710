"""What the checks of a configuration have in common."""

from __future__ import annotations

from saisa_jax.errors import UserError, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


class ConfigError(UserError, ValueError):
    """A configuration that cannot be run; the message says which flag fixes it."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{flag}={value!r} is not one of {', '.join(choices)}{did_you_mean(str(value), choices)}")


def positive(flag: str, value: float) -> None:
    check(value > 0, f"{flag}={value} must be positive")
