"""The error tree.

::

    VfioModelError
    ├── ConfigError            a file, option or topology that a person wrote is wrong: what, where, what to do
    ├── ProtocolError
    │   ├── LocalProtocolError     this side broke the protocol: our bug
    │   └── RemoteProtocolError    the peer broke it: it loses its connection, nobody else notices
    ├── PeerLost               the other process is gone (EOF, dead pidfd)
    ├── DeadlineExceeded       a wait ran out: names peer, request and seconds
    ├── VMStateError           a migration stream cannot be loaded: what, and where in it
    └── InternalGuestError     the guest cannot go on (state ``internal-error``); its process lives

Errors at the VFIO uapi are ``OSError`` with an errno, as ioctl(2) gives them. What a guest or a device can cause is
never an exception: it is a ``MemTxResult``, an hcall return code, an RTAS status or a fault record.
"""

from __future__ import annotations


class VfioModelError(Exception):
    """Base of every error of this project."""


class ConfigError(VfioModelError):
    """Something a person wrote cannot be used. ``where`` names the file, line or option; ``hint`` says what to do."""

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(f"{where}: {what}" if where else what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text} ({self.hint})" if self.hint else text


class ProtocolError(VfioModelError):
    """A message or a sequence of messages that the protocol does not allow."""


class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow: a bug of ours."""


class RemoteProtocolError(ProtocolError):
    """The peer sent what the protocol does not allow; its connection is closed."""


class PeerLost(VfioModelError):
    """The other process is gone. ``peer`` is its role or name."""

    def __init__(self, peer: str, doing: str = "") -> None:
        self.peer, self.doing = peer, doing
        super().__init__(f"{peer} is gone" + (f" (while {doing})" if doing else ""))


class DeadlineExceeded(VfioModelError):
    """A wait took longer than its deadline."""

    def __init__(self, peer: str, request: str, seconds: float) -> None:
        self.peer, self.request, self.seconds = peer, request, seconds
        super().__init__(f"{peer} did not answer {request} within {seconds:g} s")


class InternalGuestError(VfioModelError):
    """The guest machine cannot continue (QEMU's run state ``internal-error``); guestd itself lives on."""


class VMStateError(VfioModelError):
    """A migration stream cannot be loaded. ``where`` names the frame or section and the byte in it."""

    def __init__(self, what: str, *, where: str = "") -> None:
        self.what, self.where = what, where
        super().__init__(f"{where}: {what}" if where else what)
