"""Field types that every message schema of ours is made of.

A decoder checks every bound written here, so that what comes out of :mod:`protocols.codec` can be used without looking
again. msgspec takes no bound above 2**63 - 1: a :data:`U64` therefore says only "not negative", and msgpack itself has
no larger integer than 2**64 - 1. Sizes are in bytes unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

MAX_NAME = 255
MAX_TEXT = 4096
MAX_PROPS = 64

U8 = Annotated[int, Meta(ge=0, le=(1 << 8) - 1)]
U16 = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
U64 = Annotated[int, Meta(ge=0)]
"""0 to 2**64 - 1; addresses, handles, sequence numbers and cause ids."""
Errno = Annotated[int, Meta(ge=0, le=4095)]
"""0 for success, else a positive Linux errno (MAX_ERRNO is 4095)."""
Pid = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
"""A sentence for a person: why something was refused."""
Path = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
PropValue = bool | int | float | Annotated[str, Meta(max_length=MAX_TEXT)]
Props = Annotated[dict[Name, PropValue], Meta(max_length=MAX_PROPS)]
"""Device properties by name."""


class Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every message: one msgpack array, its first element the tag. Neither more nor fewer elements pass."""
