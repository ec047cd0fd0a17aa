"""Versions: a model with a catalogue, which never change. A request ends on the version that it began with."""

import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from ..recommender import Recommender
from .errors import Refused


@dataclass(frozen=True, eq=False)
class Version:
    """
    What a request is answered by.

    Args:
        name: Unique among the versions that are kept.
        recommender: Nobody changes it: another catalogue is another version (`bundles.with_catalogue`).
        origin: As the repository of the weights was loaded.
        model: Name of the weights.
        catalogue: Name of the bundle, or of the change, that the items came with.
    """

    name: str
    recommender: Recommender
    origin: Recommender
    model: str
    catalogue: str
    loaded: float = field(default_factory=time.time)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", self.recommender.model.catalogue.fingerprint())

    def summary(self) -> dict[str, Any]:
        """As `GET /info` lists it."""
        return {
            "name": self.name,
            "model": self.model,
            "catalogue": self.catalogue,
            "fingerprint": self.fingerprint,
            "num_items": len(self.recommender.model.catalogue),
            "loaded": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.loaded)),
        }


class Versions:
    """
    The current version, and the last ones before it.

    Args:
        first: Served from the start.
        keep: Versions in memory, the current one among them.
    """

    def __init__(self, first: Version, keep: int):
        self.current, self.keep, self._count = first, keep, 1
        self.kept: OrderedDict[str, Version] = OrderedDict({first.name: first})

    def free_name(self, wanted: str | None, bundles: Collection[str] = ()) -> str:
        """
        `wanted`, or the next number.

        Args:
            bundles: Names that are taken, too: those of bundles, where the version becomes one.

        Raises:
            Refused: 409, where `wanted` is taken.
        """
        taken = {*self.kept, *bundles}
        if wanted in taken:
            what = f"there is a version or bundle {wanted!r} already"
            raise Refused(409, "name_taken", f"{what}: choose another name, or roll back to it.")
        while wanted is None or wanted in taken:
            self._count += 1
            wanted = f"v{self._count}"
        return wanted

    def swap(self, version: Version) -> None:
        """The version becomes the current one; the oldest leave beyond `keep`."""
        self.kept[version.name] = version
        self.kept.move_to_end(version.name)
        self.current = version  # one assignment: a request reads it once
        while len(self.kept) > self.keep:
            self.kept.popitem(last=False)

    def roll_back(self, name: str) -> Version:
        """A kept version becomes the current one; Refused, 404, where it is not kept."""
        if name not in self.kept:
            raise Refused(404, "unknown_version", f"there is no version {name!r}; kept are {list(self.kept)}.")
        self.swap(self.kept[name])
        return self.current


__all__ = ["Version", "Versions"]
