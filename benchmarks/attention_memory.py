"""Which shared memory the compiled attention asks for, on cards that are not here: no GPU is needed.

    pip install --target outputs/triton --no-deps triton==3.7.1     # the version that a CUDA build of torch brings
    PYTHONPATH=outputs/triton python benchmarks/attention_memory.py # about ten minutes on two cores

torch renders its flex attention as for each card, whose properties are made up, and Triton compiles it to machine
code. The table on stdout compares torch's own options with those of `attention.kernel_options`; a kernel that asks for
more than a block may have does not start. It belongs into benchmarks/results/attention.md.
"""

import argparse
import ast
import importlib.util
import json
import operator
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Compute capability: the cards and the bytes of shared memory that a block may ask for.
CARDS = {
    "7.5": ("T4", 65536),
    "8.0": ("A100", 166912),
    "8.6": ("A10", 101376),
    "8.9": ("L4", 101376),
    "9.0": ("H100, H200", 232448),
    "12.0": ("G4", 101376),
}
WIDTHS = (64, 128, 256, 512)
TOKENS, HEADS, KEY_HEADS = 2048, 16, 8


def pretend(capability: str) -> None:
    """Let torch and Triton believe that there is a GPU of this compute capability. Only for a process of its own."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    major, minor = map(int, capability.split("."))
    shared = CARDS[capability][1]
    properties = types.SimpleNamespace(
        name="card", major=major, minor=minor, multi_processor_count=58, total_memory=24 << 30, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=1536, gcnArchName="", L2_cache_size=48 << 20,
        shared_memory_per_block=49152, shared_memory_per_block_optin=shared, shared_memory_per_multiprocessor=shared,
    )  # fmt: skip
    cuda = torch.cuda
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count, cuda.current_device, cuda._lazy_init = lambda: 1, lambda: 0, lambda: None
    cuda.get_device_capability = lambda *_, **__: (major, minor)
    cuda.get_device_properties, cuda.get_device_name = lambda *_, **__: properties, lambda *_, **__: "card"
    torch.version.cuda = "12.8"
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_compute_capability": 10 * major + minor,
        "is_triton_capable": True, "raise_if_triton_unavailable": None, "synchronize": None,
        "is_bf16_supported": True, "get_raw_stream": 0,
    }  # fmt: skip
    from torch._dynamo.device_interface import CudaInterface as interface  # copies what was set above

    for name, answer in answers.items():
        setattr(interface, name, staticmethod(lambda *_, answer=answer, **__: answer))
    interface.Worker.get_device_properties = staticmethod(lambda *_: properties)
    interface.Worker.current_device = staticmethod(lambda: 0)
    target = GPUTarget("cuda", 10 * major + minor, 32)
    limits = {"max_shared_mem": shared, "multiprocessor_count": 58, "warpSize": 32, "max_num_regs": 65536}
    driver = types.SimpleNamespace(
        get_current_target=lambda: target,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0,
        is_active=lambda: True,
        utils=types.SimpleNamespace(get_device_properties=lambda _: limits),
    )
    triton.runtime.driver.set_active(driver)


def render(width: int, backward: bool, options: dict) -> str:  # noqa: PLR0915
    """The code that torch's compiler writes for flex attention with a cap of 50, texts end to end and a window."""
    import torch
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward
    from torch._inductor import async_compile, config
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode, fake_tensor
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    async_compile.AsyncCompile.triton = lambda *_, **__: None  # nothing is to be compiled for this machine
    fake_tensor.init_gpu_context = lambda _: None  # a CUDA build would look for its driver
    config.compile_threads, config.triton.autotune_at_compile_time = 1, False
    score, index = torch.zeros(()), torch.zeros((), dtype=torch.int32)
    text, window = torch.zeros(TOKENS, dtype=torch.int64), torch.zeros((), dtype=torch.int64)

    def seen(_row, _head, query, key, text, window):
        with TransformGetItemToIndex():
            same = torch.ops.aten.index(text, [query]) == torch.ops.aten.index(text, [key])
        return same & (query >= key) & (query - key < window)

    def slope(score, _row, _head, _query, _key, gradient):
        return [gradient - gradient * torch.tanh(score / 50.0) ** 2]

    root = torch.nn.Module()
    root.cap = make_fx(lambda score, *_: 50.0 * torch.tanh(score / 50.0))(score, *[index] * 4)
    root.slope = make_fx(slope)(score, *[index] * 4, score)
    (output,) = (node for node in root.slope.graph.nodes if node.op == "output")
    output.args = ([*output.args[0], None, None, None, None],)
    root.slope.recompile()
    root.seen = make_fx(seen)(*[index] * 4, text, window)
    graph, fake = torch.fx.Graph(), FakeTensorMode(shape_env=ShapeEnv())

    def tensor(name, *shape, dtype=torch.bfloat16):
        node = graph.placeholder(name)
        with fake:
            node.meta["val"] = torch.empty(shape, dtype=dtype, device="cuda")
        return node

    blocks = -(-TOKENS // 128)
    numbers = {"query": HEADS, "key": KEY_HEADS, "value": KEY_HEADS}
    query, key, value = (tensor(name, 1, heads, TOKENS, width) for name, heads in numbers.items())
    states = [query, key, value]
    if backward:
        states += [tensor("out", 1, HEADS, TOKENS, width), tensor("lse", 1, HEADS, TOKENS, dtype=torch.float32)]
        states += [tensor("gradient", 1, HEADS, TOKENS, width), None]
    table = []
    for name in ("kv", "full_kv", "q", "full_q"):
        table.append(tensor(f"{name}_number", 1, 1, blocks, dtype=torch.int32))
        table.append(tensor(f"{name}_index", 1, 1, blocks, blocks, dtype=torch.int32))
    captured = tensor("text", TOKENS, dtype=torch.int64), tensor("window", dtype=torch.int64)
    cap, slope_of, mask = (graph.get_attr(name) for name in ("cap", "slope", "seen"))
    newer = () if torch.__version__ < "2.12" else (None, None, None, False)
    mask = (TOKENS, TOKENS, *table, *newer, 128, 128, mask)
    results = [states[0].meta["val"], key.meta["val"], value.meta["val"], ()]
    given = {"OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False, "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False}
    given |= {"BLOCKS_ARE_CONTIGUOUS": False, "WRITE_DQ": True} | options
    if backward:
        node = graph.call_function(
            flex_attention_backward, (*states, cap, slope_of, mask, width**-0.5, given, (), captured)
        )
    else:
        node = graph.call_function(flex_attention, (*states, cap, mask, width**-0.5, given, (), captured))
        with fake:
            rows = torch.empty(1, HEADS, TOKENS, dtype=torch.float32, device="cuda")
        results = [states[0].meta["val"], rows, rows]
    node.meta["val"] = tuple(results)
    outputs = [graph.call_function(operator.getitem, (node, place)) for place in range(3 if backward else 2)]
    for place, part in enumerate(outputs):
        part.meta["val"] = results[place]
    graph.output(tuple(outputs))
    module = torch.fx.GraphModule(root, graph)
    inputs = [node.meta["val"] for node in graph.nodes if node.op == "placeholder"]
    lowering = GraphLowering(module, example_inputs=inputs, shape_env=fake.shape_env)
    with V.set_graph_handler(lowering), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
        lowering.run(*inputs)
        code, _ = lowering.codegen()
    return code.value if hasattr(code, "value") else str(code)


def compile_kernel(code: str, capability: str) -> dict:
    """Compile the attention kernel in this code; its blocks, stages and bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.S)
    ((name, source),) = ((name, source) for name, source in kernels if "tem_fused" in name)
    decorator = re.compile(r"@triton_heuristics\.template\((.*?)\)\s*@triton\.jit", re.S)
    about = decorator.search(source).group(1)
    stages, warps = (int(re.search(rf"{key}=(\d+)", about).group(1)) for key in ("num_stages", "num_warps"))
    signature, constants = (
        ast.literal_eval(re.search(rf"'{key}': (\{{.*?\}})", about, re.S).group(1))
        for key in ("signature", "constants")
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.py")
        file.write_text(decorator.sub("@triton.jit", source), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("kernel", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
        names = function.arg_names
        aligned = {
            (place,): [["tt.divisibility", 16]] for place, n in enumerate(names) if signature.get(n, "").startswith("*")
        }
        constants = {(names.index(key),): value for key, value in constants.items()}
        kernel = triton.compile(
            ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", int(capability.replace(".", "")), 32),
            options={"num_stages": stages, "num_warps": warps},
        )
    blocks = re.findall(r"(BLOCK_[MN][12]?) : tl.constexpr = (\d+)", source)
    return {
        "blocks": "x".join(size for _, size in dict(blocks).items()),
        "stages": stages,
        "bytes": kernel.metadata.shared,
    }


def measure(capability: str, width: int, backward: bool, options: dict) -> dict:
    """What one kernel asks for; its bytes are None if it does not compile."""
    result = {"card": capability, "width": width, "backward": backward, "options": options}
    try:
        return result | compile_kernel(render(width, backward, {"BACKEND": "TRITON"} | options), capability)
    except Exception as error:
        return result | {"bytes": None, "error": f"{type(error).__name__}: {error}"[:200]}


def child(capability: str, tried: list) -> None:
    """Print a line of JSON for every kernel of one card."""
    pretend(capability)
    from engine import attention

    for width in WIDTHS:
        ours = attention.kernel_options(width, CARDS[capability][1])
        for backward in (False, True):
            for options in tried or ([{}] if ours == {"BACKEND": "TRITON"} else [{}, ours]):
                print(json.dumps(measure(capability, width, backward, options)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, nargs="*", default=[], help="JSON, instead of the recipe's own")
    arguments = parser.parse_args()
    if arguments.card:
        child(arguments.card, arguments.options)
        return
    import torch
    import triton

    print(f"torch {torch.__version__}, Triton {triton.__version__}, bfloat16, cap of 50\n")
    header = ["card", "allowed", "heads", "pass", "torch's own options", "bytes", "ours", "bytes"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for capability, (names, allowed) in CARDS.items():
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
            environment |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            command = [sys.executable, __file__, "--card", capability]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            sys.exit(done.stderr[-2000:])
        for width in WIDTHS:
            for backward in (False, True):
                found = [line for line in lines if (line["width"], line["backward"]) == (width, backward)]
                cells = [f"sm_{capability.replace('.', '')} ({names})", f"{allowed:,}", width]
                cells += ["backward" if backward else "forward"]
                for line in (found[0], found[-1]):
                    asked = line["bytes"]
                    cells.append(f"{line.get('blocks', '')}, {line.get('stages', '')} stages")
                    cells.append(
                        line["error"] if asked is None else f"{asked:,}" if asked <= allowed else f"**{asked:,}**"
                    )
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
