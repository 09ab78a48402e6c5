"""The subcommands of ``python -m espkernels``: each module has ``add_arguments(parser)`` and ``run(args) -> int``."""
