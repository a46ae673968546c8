"""For tests of device models, inside and outside of this project: :class:`~vfio_model.testing.bench.Bench`."""

from vfio_model.testing.bench import Bench as Bench
