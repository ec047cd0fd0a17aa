"""A watched folder: the service follows a file that names the catalogue bundle to serve."""

import asyncio
from pathlib import Path

from .errors import Refused
from .schemas import CatalogueBody
from .service import Service

CURRENT = "CURRENT"  # file of the folder of bundles; a publisher renames a new one over it, when its bundle is whole


async def follow(service: Service, seconds: float) -> None:
    """
    Looks every so many `seconds` which bundle the file names, and swaps to it; runs until it is cancelled.

    A bundle that is refused is logged, and tried again when the file changes.
    """
    assert service.bundles is not None
    done = service.versions.current.catalogue
    while True:
        await asyncio.sleep(seconds)
        named = await asyncio.to_thread(named_bundle, service.bundles)
        if named is None or named == done:
            continue
        name, number = named, 1
        while name in service.versions.kept:  # it was served before, perhaps with other weights
            number += 1
            name = f"{named}.{number}"
        try:
            await service.change_catalogue(CatalogueBody.model_validate({"bundle": named, "name": name}))
        except (Refused, ValueError) as error:  # logged; ValueError: no name of a bundle
            if isinstance(error, Refused) and error.code == "swap_running":
                continue
        done = named


def named_bundle(folder: Path) -> str | None:
    """What the file names; None without one, or where it cannot be read."""
    try:
        return (folder / CURRENT).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


__all__ = ["CURRENT", "follow", "named_bundle"]
