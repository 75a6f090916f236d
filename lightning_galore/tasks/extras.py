# SPDX-License-Identifier: Apache-2.0
"""The optional packages of the recipes, imported when they are first needed."""

from importlib import import_module
from types import ModuleType


def require(name: str, *, extra: str = "recipes") -> ModuleType:
    """Import an optional package.

    The packages are imported inside functions, so that ``lightning-galore --help`` and a plain
    ``import lightning_galore`` neither need them nor wait for them.

    Args:
        name: The module to import, for example ``"transformers"``.
        extra: The extra of this package that brings it.

    Returns:
        The imported module.

    Raises:
        ModuleNotFoundError: If the package is not installed; the message names the extra that brings it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise  # the package is there; something that it imports itself is missing
        raise ModuleNotFoundError(
            f"The tasks need the package {error.name!r}, which is not installed. "
            f'Install it with: pip install "lightning-galore[{extra}]"',
            name=error.name,
        ) from error
