"""The subcommands of ``vfio-model``, one module each; :mod:`deploy.cli` imports the one that is invoked."""
