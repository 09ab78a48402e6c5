"""The subcommands of ``python -m espkernels``: each module has ``add_arguments(parser)`` and ``run(args) -> int``.

But for photographs.py: the images that some of them are given.
"""
