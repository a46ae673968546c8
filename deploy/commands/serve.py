"""``vfio-model serve``: a device model for QEMU, or for any other vfio-user client."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from vfio_model.errors import ConfigError


@click.command()
@click.argument("device", metavar="DEVICE[,PROP=VALUE...]")
@click.option("--socket", "--socket-path", "path", metavar="PATH", help="Where to listen (at most 107 bytes).")
@click.option("--fd", type=click.IntRange(min=0), help="Instead: an inherited socket, listening or connected.")
@click.option("--trace", "directory", type=click.Path(path_type=Path, file_okay=False), help="Keep a trace in there.")
@click.option("--json", "as_json", is_flag=True, help="When ready, say so as one line of JSON on stdout.")
def command(device: str, path: str | None, fd: int | None, directory: Path | None, as_json: bool) -> NoReturn:
    """Serve DEVICE by vfio-user, until Ctrl-C: QEMU's vfio-user-pci attaches it.

    DEVICE is a model (edu, iommu-testdev, …) or a class of your own as path/to/file.py:Class, with properties as QEMU
    writes them (a comma in a value is doubled): edu,dma_mask=0xffffffff.

    Prints the QEMU command line to paste when the device can be attached. Clients may come and go: the device keeps its
    state, and what it does while nobody is connected is nothing. Exit status 0 after Ctrl-C or SIGTERM, 2 when
    something is wrong with what was asked for.
    """
    if (path is None) == (fd is None):
        raise ConfigError("where shall it be reached?", where="serve", hint="give --socket PATH or --fd N")
    model, *pairs = _pieces(device)
    # -P: what lies in the working directory is not what this project imports
    argv = [sys.executable, "-P", "-m", "hostd", "device", "--model", model]
    argv += ["--socket", os.path.abspath(path)] if path is not None else ["--fd", str(fd)]
    for pair in pairs:
        argv += ["--prop", pair]
    if directory is not None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        argv += ["--dir", str(directory.absolute())]
    argv += ["--announce", "json" if as_json else "text"]
    if fd is not None:
        try:
            os.set_inheritable(fd, True)
        except OSError as error:
            raise ConfigError(f"descriptor {fd} is not open: {error.strerror}", where="--fd") from error
    sys.stdout.flush()
    os.execv(argv[0], argv)


def _pieces(text: str) -> list[str]:
    """Split at commas; two of them are one that belongs to a value."""
    return [piece.replace("\0", ",") for piece in text.replace("\0", "").replace(",,", "\0").split(",")]
