"""The inference engines that are compared, and how each is given a model: as its own users would for the best speed.

All of them compute in the dtype and on the number of threads asked for, with every graph optimisation on; inputs and
outputs are bound or allocated once where the engine allows. Some are given the model in several ways, since which is
faster depends on the row; the fastest way counts, for the peers as for this library.

* torch and this library take contiguous and channels_last maps. torch.compile freezes the weights and autotunes.
* onnxruntime has no fused PReLU: with others in its place is the second way (:mod:`bench.onnx_export`).
* OpenVINO takes its maps as [B, C, H, W] and, declared so to its preprocessing, as [B, H, W, C], which spares a
  channels_last caller two transpositions.
* ncnn runs a batch in one go, and image by image. pnnx converts a TorchScript trace for it.
* LiteRT, on XNNPACK, takes its maps in both layouts like OpenVINO. Its converter asks for an older typing_extensions
  than the tools of this project, and for two gigabytes: 'make peers' gives it an environment of its own, .venv/litert.

In bfloat16 torch and this library take a model and an input of that dtype, and OpenVINO turns what it stores and
multiplies into it itself. onnxruntime and LiteRT have no such kernels for CPUs, and ncnn's results came out wrong.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.comparison import LAYOUTS
from bench.layers import output_shape
from bench.onnx_export import export
from espkernels import backends
from espkernels.freeze import freeze

__all__ = ["ENGINES", "OURS", "Engine", "Job", "Opened", "why_not"]

OURS = "ours"


@dataclass(frozen=True)
class Job:
    """A float32 model and input, the dtype to compute in, and a folder that holds what engines convert the model to.

    ``gradient`` is that of the result, where a training step is given it (:mod:`bench.training_step`).
    """

    model: nn.Module
    input: Tensor
    threads: int
    way: str
    folder: Path
    gradient: Tensor | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Opened:
    """``call`` is what is timed; ``results`` gives the output of the last call as [B, ...] and what gradients it made.

    ``kept`` counts the bytes that a forward pass keeps for the backward one.
    """

    call: Callable[[], object]
    results: Callable[[], list[Tensor]]
    kept: Callable[[], int] | None = None


@dataclass(frozen=True)
class Engine:
    """``ways`` of giving it a model, the ``packages`` (import names) that it needs, and the function that opens one."""

    ways: tuple[str, ...]
    packages: tuple[str, ...]
    open: Callable[[Job], Opened]

    def ways_of(self, batch: int) -> tuple[str, ...]:
        """The ways that differ for a batch: one image is no batch."""
        return tuple(way for way in self.ways if batch > 1 or way != "batch")


def _torch(prepare: Callable[[nn.Module], Any]) -> Callable[[Job], Opened]:
    def opened(job: Job) -> Opened:
        torch.set_num_threads(job.threads)
        layout = LAYOUTS[job.way]
        model = prepare(job.model.to(job.dtype, memory_format=layout))  # type: ignore[call-overload]
        x = job.input.to(job.dtype).contiguous(memory_format=layout)
        last: list[Tensor] = []

        @torch.inference_mode()
        def call() -> None:
            last[:] = [model(x)]

        return Opened(call, lambda: [last[0].contiguous().float()])

    return opened


def _compiled(model: nn.Module) -> Any:
    from torch._inductor import config

    config.freezing = True
    torch.compiler.reset()
    return torch.compile(model, mode="max-autotune", dynamic=False)


def _onnxruntime(job: Job) -> Opened:
    import onnxruntime

    if job.dtype != torch.float32:
        raise RuntimeError("no bfloat16 kernels for CPUs")
    path = job.folder / f"{job.way}.onnx"
    if not path.exists():
        export(job.model, job.input, path, relu=job.way == "relu")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads, options.inter_op_num_threads = job.threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    x = job.input.numpy()
    output = torch.empty(output_shape(job.model, job.input))
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("y", "cpu", 0, output.numpy().dtype, tuple(output.shape), output.data_ptr())
    return Opened(lambda: session.run_with_iobinding(binding), lambda: [output])


def _openvino(job: Job) -> Opened:
    import openvino
    from openvino.preprocess import PrePostProcessor

    x, output = job.input, torch.empty(output_shape(job.model, job.input))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = openvino.convert_model(job.model, example_input=x, input=[tuple(x.shape)])
    if job.way == "channels_last":
        processor = PrePostProcessor(model)
        processor.input().model().set_layout(openvino.Layout("NCHW"))
        processor.input().tensor().set_layout(openvino.Layout("NHWC"))
        x = x.permute(0, 2, 3, 1).contiguous()
        if output.dim() == 4:
            processor.output().model().set_layout(openvino.Layout("NCHW"))
            processor.output().tensor().set_layout(openvino.Layout("NHWC"))
            output = output.permute(0, 2, 3, 1).contiguous()
        model = processor.build()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(job.threads),
        # Where the machine multiplies bfloat16 the engine would otherwise choose it.
        "INFERENCE_PRECISION_HINT": "f32" if job.dtype == torch.float32 else "bf16",
    }
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    # The tensors share the memory of x and output, which must live as long as they do.
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(output.numpy(), shared_memory=True))
    moved = job.way == "channels_last" and output.dim() == 4

    def call(kept: Tensor = x) -> None:
        # infer() would copy the outputs into new arrays.
        request.start_async()
        request.wait()

    return Opened(call, lambda: [output.permute(0, 3, 1, 2).contiguous() if moved else output])


def _ncnn(job: Job) -> Opened:
    import ncnn

    if job.dtype != torch.float32:
        raise RuntimeError("with its bfloat16 storage the results that its Python package gives are not the model's")
    batched = job.way == "batch"
    images = job.input if batched else job.input[:1]
    net = ncnn.Net()
    net.opt.num_threads = job.threads
    net.opt.use_vulkan_compute = False
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage"):
        setattr(net.opt, name, False)
    stem = _pnnx(job, images)
    if net.load_param(f"{stem}.ncnn.param") or net.load_model(f"{stem}.ncnn.bin"):
        raise RuntimeError("ncnn could not load what pnnx made of the model")
    parts = [job.input] if batched else list(job.input)
    mats = [ncnn.Mat(part.numpy(), **({"batch_index": 0} if batched else {})).clone() for part in parts]
    last: list[Any] = []

    def call() -> None:
        outputs = []
        for mat in mats:
            extractor = net.create_extractor()
            extractor.input("in0", mat)
            status, output = extractor.extract("out0")
            if status:
                raise RuntimeError(f"ncnn could not run the model: status {status}")
            outputs.append(output)
        last[:] = outputs

    def results() -> list[Tensor]:
        if batched:
            return [torch.from_numpy(last[0].numpy(batch_index=0).copy())]
        return [torch.stack([torch.from_numpy(output.numpy().copy()) for output in last])]

    return Opened(call, results)


def _pnnx(job: Job, images: Tensor) -> str:
    """The model converted for ncnn; the stem of its files."""
    import pnnx

    stem = job.folder / f"ncnn{images.shape[0]}"
    if not stem.with_suffix(".ncnn.bin").exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(job.model, images, check_trace=False).save(f"{stem}.pt")
        binary = Path(pnnx.__file__).parent / "pnnx"
        shape = f"inputshape=[{','.join(map(str, images.shape))}]f32"
        # The optimiser would look for ONNX and Python files that nobody reads; weights stay float32.
        done = subprocess.run(
            [os.fspath(binary), f"{stem}.pt", shape, "fp16=0"],
            cwd=job.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not stem.with_suffix(".ncnn.bin").exists():
            raise RuntimeError(f"pnnx could not convert the model: {(done.stderr or done.stdout).strip()[-300:]}")
    return str(stem)


# Where 'make peers' puts LiteRT's converter.
LITERT_PYTHON = Path(sys.prefix) / "litert" / "bin" / "python"


def _litert(job: Job) -> Opened:
    from ai_edge_litert.interpreter import Interpreter

    if job.dtype != torch.float32:
        raise RuntimeError("no bfloat16 kernels for CPUs")
    interpreter = Interpreter(model_path=_tflite(job), num_threads=job.threads)
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    last = job.way == "channels_last"
    interpreter.set_tensor(given["index"], (job.input.permute(0, 2, 3, 1) if last else job.input).numpy())

    def results() -> list[Tensor]:
        output = torch.from_numpy(interpreter.get_tensor(made["index"]))
        return [output.permute(0, 3, 1, 2).contiguous() if last and output.dim() == 4 else output]

    return Opened(interpreter.invoke, results)


def _tflite(job: Job) -> str:
    """The model converted for LiteRT; the name of its file."""
    program, file = job.folder / "litert.pt2", job.folder / f"{job.way}.tflite"
    if not file.exists():
        torch.export.save(torch.export.export(job.model, (job.input,)), program)
        exporter = Path(__file__).with_name("litert_export.py")
        command: list[str | Path] = [LITERT_PYTHON, "-I", exporter, program, file, job.way]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"its converter could not convert the model: {done.stderr.strip()[-300:]}")
    return str(file)


ENGINES = {
    OURS: Engine(tuple(LAYOUTS), (), _torch(freeze)),
    "eager": Engine(tuple(LAYOUTS), (), _torch(lambda model: model)),
    "compile": Engine(tuple(LAYOUTS), (), _torch(_compiled)),
    "onnxruntime": Engine(("prelu", "relu"), ("onnxruntime", "onnx"), _onnxruntime),
    "openvino": Engine(tuple(LAYOUTS), ("openvino",), _openvino),
    "ncnn": Engine(("batch", "images"), ("ncnn", "pnnx"), _ncnn),
    "litert": Engine(tuple(LAYOUTS), ("ai_edge_litert",), _litert),
}


def why_not(name: str) -> str | None:
    """Why the engine cannot run here, in a sentence; None where it can."""
    if name == OURS:
        return backends.why_not("cpu")
    missing = [package for package in ENGINES[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} not found; 'make peers' installs them: the extra 'peers'"
    if name == "litert" and not LITERT_PYTHON.exists():
        return f"its converter is not in {LITERT_PYTHON.parents[1]}, where 'make peers' puts it"
    return None
