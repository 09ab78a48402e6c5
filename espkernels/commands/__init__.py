"""The subcommands of ``python -m espkernels``: each module has ``add_arguments(parser)`` and ``run(args) -> int``.

But for what several of them share: photographs.py, the images that some are given; extras.py, what they need
installed; worker_errors.py, what went wrong in a process that reads data.
"""
