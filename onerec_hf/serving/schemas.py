"""The bodies of requests. Types are strict: `"7"`, `7.0` and `true` are not the item id 7."""

from typing import Annotated, Any, Literal

from pydantic import AllowInfNan, BaseModel, ConfigDict, FailFast, Field, StrictBool, StrictFloat, StrictInt, StrictStr


class _First(FailFast):
    """Reports the first bad element of a list, and not each of 100,000; with a hash, which a union of types needs."""

    def __hash__(self) -> int:
        return id(type(self))


ItemId = StrictInt | StrictStr
Ids = Annotated[list[ItemId], _First()]
Histories = Annotated[list[Ids], _First(), Field(min_length=1)]
Filter = Ids | Annotated[list[Ids | None], _First()] | None
Number = Annotated[StrictFloat, AllowInfNan(False)] | StrictInt | StrictBool | None
Column = Annotated[list[Annotated[list[Number], _First()]], _First()]
Value = StrictInt | StrictStr | StrictBool | Annotated[StrictFloat, AllowInfNan(False)] | None
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RecommendBody(_Body):
    """The arguments of `Recommender.recommend`, by their names."""

    histories: Histories = Field(description="Per user the ids of the items, oldest first; may be empty.")
    k: StrictInt = Field(10, ge=1, description="Items, or sessions, per user.")
    exclude_seen: StrictBool = Field(False, description="Leave out the items of the history.")
    allow: Filter = Field(
        None, description="Ids that alone may come: a list for all users, or one (or null) per user."
    )
    deny: Filter = Field(None, description="Ids that may not come, in the same form.")
    events: dict[str, Column] = Field({}, description="Event columns that the model reads, parallel to `histories`.")
    users: dict[str, Annotated[list[Value], _First()]] = Field({}, description="User features, one value per user.")
    unknown_items: Literal["error", "ignore"] = Field("error", description="Ids that the catalogue does not have.")
    session: StrictBool = Field(False, description="Whole sessions, of a OneRec model.")
    rerank: StrictBool = Field(True, description="Whether the repository's re-ranker orders the items.")


class Item(_Body):
    """A new item, or one that takes the place of an old one of the same id."""

    item_id: ItemId
    embedding: Annotated[list[Annotated[float, AllowInfNan(False)]], _First()] | None = Field(
        None, description="From the embedding model of the codebooks. Left out: an old item keeps its semantic ID."
    )
    metadata: dict[str, Any] = Field({}, description="Returned with the item; replaces what was known of it.")


class CatalogueBody(_Body):
    """A bundle, or changes (`items`, `remove`), or a version to roll back to."""

    bundle: Name | None = Field(None, description="Folder of the service's bundles.")
    items: Annotated[list[Item], _First()] = Field([], description="Items that are added or replaced.")
    remove: Ids = Field([], description="Ids of items that leave.")
    rollback_to: Name | None = Field(None, description="Name of a version that `GET /info` lists.")
    name: Name | None = Field(None, description="Of the new version; default the bundle's, or a number.")
    fingerprint: str | None = Field(None, description="Of the catalogue that is to be changed; another is refused.")


class ModelBody(_Body):
    """A repository among the service's bundles, or a version to roll back to."""

    bundle: Name | None = Field(None, description="Folder of the service's bundles: a repository of `onerec sft`.")
    catalogue: Literal["own", "keep"] = Field(
        "own", description="Whose items are served: the repository's, or the current ones (same codebooks needed)."
    )
    rollback_to: Name | None = Field(None, description="Name of a version that `GET /info` lists.")
    name: Name | None = Field(None, description="Of the new version; default the bundle's.")


__all__ = ["CatalogueBody", "Item", "ModelBody", "RecommendBody"]
