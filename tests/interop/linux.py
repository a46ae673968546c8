"""A stock Linux as a guest: its root file system, made of a kernel's modules, busybox and a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.interop.initramfs import Initramfs, modules

DONE = "interop: all is well"
"""What the guest says last when every step went well."""

_INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox --install -s /bin
export PATH=/bin
fail() {{ echo "interop: failed: $*"; poweroff -f; }}
for module in {modules}; do insmod /lib/modules/$module || fail $module; done
{script}
echo "{done}"
poweroff -f
"""


def initramfs(guest: Path, wanted: Sequence[str], script: str, programs: Sequence[str] = ()) -> bytes:
    """The root file system: the modules ``wanted`` and what they need, loaded in order, then ``script``. ``guest`` is
    what ``tools/get-qemu`` made of the packages; ``programs`` are others beside busybox there.
    """
    (tree,) = (guest / "lib/modules").iterdir()
    made = Initramfs()
    for program in ("busybox", *programs):
        made.file(f"bin/{program}", (guest / program).read_bytes(), executable=True)
    found = modules(tree, wanted)
    for name, data in found:
        made.file(f"lib/modules/{name}", data)
    names = " ".join(name for name, _ in found)
    made.file("init", _INIT.format(modules=names, script=script, done=DONE).encode(), executable=True)
    return made.archive()
