"""A TFLite file of an exported program, written by LiteRT's converter: run with the Python that has it.

``python -I litert_export.py PROGRAM FILE WAY``: the file that ``torch.export.save`` wrote, the one to write, and
"contiguous" or "channels_last", which has the maps at both ends as [B, H, W, C]. It imports nothing of this project,
since the converter needs an environment of its own (:mod:`bench.engines`).
"""

from __future__ import annotations

import sys

import litert_torch
import torch


def main(program: str, file: str, way: str) -> None:
    exported = torch.export.load(program)
    model = exported.module()
    (x,), _ = exported.example_inputs
    if way == "channels_last":
        maps = [0] if model(x).dim() == 4 else None
        model = litert_torch.to_channel_last_io(model, args=[0], outputs=maps)
        x = x.permute(0, 2, 3, 1).contiguous()
    litert_torch.convert(model, (x,)).export(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
