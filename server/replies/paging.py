"""Lists, in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel

from index.paging import Page


class Identified(BaseModel):
    id: str


Item = TypeVar("Item", bound=Identified)
T = TypeVar("T")


class ListReply(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def list_reply(page: Page[T], spell: Callable[[T], Item]) -> ListReply[Item]:
    data = [spell(item) for item in page.items]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return ListReply(data=data, first_id=first, last_id=last, has_more=page.has_more)
