"""What a client asks while a device waits for memory: it may reset it, ring it again, take its queues away.

A device whose DMA goes by message serves its client in every wait, so that all of this happens inside ``dma``. Each
test does it in the first DMA of a piece of work, then in the second one, and so on to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from tests.devices.e1000_driver import Nic
from tests.devices.nvme_host import DATA, NvmeHost
from vfio_model.devices.e1000 import regs as e1000
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode


def until_it_has_no_more(work: Callable[[int], bool]) -> int:
    """``work(skip)`` for 0, 1, 2 … until nothing happened in it; how often something did."""
    return next(skip for skip in count() if not work(skip))


def delete_queue(host: NvmeHost) -> None:
    host.push(0, AdminOpcode.DELETE_SQ, cdw=(1,))
    host.ring(0)


@pytest.mark.parametrize(
    "meddle",
    [
        lambda host: host.reset(),
        lambda host: host.disable(),
        lambda host: host.ring(1),
        delete_queue,
        lambda host: host.device.config_write(4, 2, 2),
    ],
    ids=["reset", "disabled", "rung", "queue deleted", "no bus master"],
)
def test_nvme(meddle: Callable[[NvmeHost], None]) -> None:
    def work(skip: int) -> bool:
        happened = []
        host = NvmeHost()
        host.start()
        host.during_dma(lambda: happened.append(meddle(host)), skip=skip)
        for opcode in (NvmOpcode.WRITE, NvmOpcode.READ):
            for block in range(3):
                host.push(1, opcode, nsid=1, prp1=DATA + 0x4000 * block, prp2=DATA + 0x40000, cdw=(block, 0, 31))
        host.ring(1)
        host.advance(1_000_000)
        host.device.attach_dma(host.space)
        host.reset()
        host.start()
        assert host.submit(1, NvmOpcode.READ, nsid=1, prp1=DATA).status == 0
        return bool(happened)

    assert until_it_has_no_more(work) > 6


@pytest.mark.parametrize(
    "meddle",
    [
        lambda nic: nic.reset(),
        lambda nic: nic.write(e1000.CTRL, int(e1000.Ctrl.RST)),
        lambda nic: nic.kick(),
        lambda nic: (nic.write(e1000.TCTL, 0), nic.write(e1000.RCTL, 0)),
    ],
    ids=["reset", "software reset", "rung", "stopped"],
)
def test_e1000(meddle: Callable[[Nic], None]) -> None:
    def work(skip: int) -> bool:
        happened = []
        nic = Nic().up()
        nic.during_dma(lambda: happened.append(meddle(nic)), skip=skip)
        for number in range(4):
            nic.send(bytes([number]) * 100)
            nic.wire.deliver(bytes([0xFF] * 6) + bytes(100))
            nic.advance(1_000_000)
        nic.device.attach_dma(nic.space)
        nic.reset()
        nic.wire.waiting.clear()
        nic.wire.sent.clear()
        nic.tx_tail = 0
        nic.up()
        nic.send(b"\7" * 100)
        nic.advance(1_000_000)
        assert nic.wire.sent == [b"\7" * 100]
        return bool(happened)

    assert until_it_has_no_more(work) > 6
