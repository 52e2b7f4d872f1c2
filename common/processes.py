"""The place of this process among those that torchrun started, for work that needs no communication."""

import os
from typing import Annotated, NamedTuple

from pydantic import Field

from common.errors import UserError
from common.schema import record, validate


class Place(NamedTuple):
    rank: int
    world: int  # number of processes
    local_rank: int  # among those of this machine


@record
class _Environment:
    RANK: Annotated[int, Field(strict=False, ge=0, lt=2**20)] = 0
    WORLD_SIZE: Annotated[int, Field(strict=False, ge=1, le=2**20)] = 1
    LOCAL_RANK: Annotated[int, Field(strict=False, ge=0, lt=2**20)] = 0


def own_place() -> Place:
    """Rank 0 of 1 without torchrun. UserError where the variables are no numbers or contradict each other."""
    variables = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in os.environ}
    place = validate(_Environment, variables, "environment")
    if place.RANK >= place.WORLD_SIZE:
        raise UserError(f"environment: RANK = {place.RANK} is not below WORLD_SIZE = {place.WORLD_SIZE}: use torchrun")
    return Place(place.RANK, place.WORLD_SIZE, place.LOCAL_RANK)
