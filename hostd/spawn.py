"""Children by ``multiprocess`` (spawn), without its resource tracker.

The tracker is a further process that multiprocess starts beside the first child, to clean up named semaphores and
shared memory segments. Nothing here has either (memfds go with their last user), and the tracker would outlive what
it was started for. A child that wants one starts its own.
"""

from __future__ import annotations

import io
import os

import multiprocess
from multiprocess import popen_spawn_posix, reduction, spawn, util
from multiprocess.context import set_spawning_popen


class _Launch(popen_spawn_posix.Popen):  # type: ignore[misc]
    """Launches the interpreter that becomes the child, and hands it what to run through a pipe."""

    def _launch(self, process_obj: object) -> None:
        data = self._pickled(process_obj)
        read_end, write_end = os.pipe()
        ended, end_writer = os.pipe()
        try:
            command = spawn.get_command_line(tracker_fd=None, pipe_handle=read_end)
            self.pid = util.spawnv_passfds(spawn.get_executable(), command, [*self._fds, read_end, end_writer])
        finally:
            os.close(read_end)
            os.close(end_writer)
            self.sentinel = ended
            self.finalizer = util.Finalize(self, util.close_fds, (ended, write_end))
        with open(write_end, "wb", closefd=False) as pipe:
            pipe.write(data)

    def _pickled(self, process_obj: object) -> memoryview:
        buffer = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj._name), buffer)  # type: ignore[attr-defined]
            reduction.dump(process_obj, buffer)
        finally:
            set_spawning_popen(None)
        return buffer.getbuffer()


class SpawnProcess(multiprocess.context.SpawnProcess):  # type: ignore[misc]
    """A process of the spawn method that is launched as above."""

    @staticmethod
    def _Popen(process_obj: object) -> _Launch:
        return _Launch(process_obj)
