"""Compiles every kernel for an NVIDIA GPU of capability 8.0; needs Triton, but no GPU. Run by `test_triton.py`."""

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from retort.kernels import triton_jit, triton_rows

INTEGERS = {"vocab", "blocks", "splits", "kept", "student_stride", "teacher_stride", "out_stride"}
FLOATS = {"student_scale", "teacher_scale", "weight"}
COEFFICIENTS = ("pull_grad", "entropy_grad", "reverse_grad", "forward_grad", "jsd_grad")
ALONE = ("teacher_lse", "reverse", "mixture", *COEFFICIENTS[2:])
CASES: list[tuple[str, tuple[str, ...]]] = [
    ("student_moments", ()),
    ("pair_moments", ()),
    ("jsd_moments", ()),
    ("merge_student", ()),
    ("merge_pair", ()),
    ("gradient", ()),
    ("gradient", ("teacher", *ALONE)),
    ("gradient", ("pull_grad", "reverse_grad", "forward_grad")),
    ("gradient_at_ids", ()),
    ("gradient_at_ids", ("teacher_at", "entropy_grad", *ALONE)),
]


def kind(kernel: str, name: str, logits: str) -> str:
    if name in INTEGERS:
        return "i32"
    if name in FLOATS:
        return "fp32"
    if name == "ids":
        return "*i64"
    given = name in {"student", "teacher", "student_at", "teacher_at"} or (name == "out" and "gradient" in kernel)
    return f"*{logits if given else 'fp32'}"


def build(kernel: str, absent: tuple[str, ...], logits: str) -> None:
    function = getattr(triton_jit, kernel)
    constants: dict[Any, Any] = dict.fromkeys(absent) | {"BLOCK": triton_rows.STATISTICS_BLOCK, "SPLITS": 64}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {n: "constexpr" if n in constants else kind(kernel, n, logits) for n in function.arg_names}
    warps = triton_rows.STATISTICS_WARPS if "moments" in kernel else triton_rows.GRADIENT_WARPS
    source = ASTSource(function, signature, {(function.arg_names.index(n),): v for n, v in constants.items()})
    compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": warps})


for name, missing in CASES:
    for dtype in ("fp32", "bf16", "fp16") if not missing else ("bf16",):
        build(name, missing, dtype)
