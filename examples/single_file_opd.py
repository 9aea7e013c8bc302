"""On-policy distillation (OPD) of a language model in one file: PyTorch and transformers, nothing of Retort.

A small model, the student, writes answers to prompts. A larger model, the teacher, reads them and says of every token
how likely it would have been to write it there. The student learns from the difference: what the teacher finds likelier
than the student does becomes likelier, and what it finds less likely becomes less likely. So the student is taught at
every token, and about its own mistakes, in the places it gets itself into. Nobody has to know right answers: it takes
prompts, and a teacher with the student's tokenizer.

    python examples/single_file_opd.py                   # EOPD on two tiny models of this repository; CPU, a minute
    python examples/single_file_opd.py --method opd
    python examples/single_file_opd.py --student Qwen/Qwen3-0.6B-Base --teacher Qwen/Qwen3-1.7B-Base \
        --prompts prompts.txt --tokens 128 --batch 16 --eval 32 --learning-rate 1e-5 --device cuda

Where the numbers come from: sampled reverse KL is "On-Policy Distillation" (Thinking Machines Lab, 2025); the threshold
of 0.8 nats and the top 16 are those of EOPD (Jin et al., ICML 2026, arXiv 2603.07079); steps, batch and learning rate
were tried out on the tiny models. A line "step" is about the batch just written, on problems that the teacher knows;
"before" and "after" are about problems that neither model was ever trained on, 321 of them by default with four answers
each, so the share right is good to about 4 points. Seeds 0 and 1: it rose from 25 to 55 % with eopd and with opd
(teacher: 77 to 79 %); forward KL where the teacher is uncertain was 0.31 and 0.32 nats before, 0.40 and 0.33 after
eopd, 0.49 and 0.43 after opd. Two seeds are no benchmark. All logarithms are natural.

Letters at the end of a tensor's name are its axes: B sequences, L tokens of a sequence, A tokens of an answer,
V vocabulary, N counted tokens (all that the student wrote, end to end), K kept candidates.
"""

import argparse
import itertools
import operator
import random
import re
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

MODELS = Path(__file__).resolve().parents[1] / "retort" / "tasks" / "countdown" / "models"
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def countdown() -> tuple[list[str], list[str]]:
    """Prompts to train on, and prompts held out: "45 from 3 5 12 :" wants "12 - 3 = 9 , 9 * 5 = 45"."""
    sides: tuple[list[str], list[str]] = ([], [])
    for numbers in itertools.combinations_with_replacement(range(1, 13), 3):
        targets = set()
        for (a, b, c), op, then in itertools.product(itertools.permutations(numbers), *[OPERATIONS.values()] * 2):
            if op(a, b) >= 0:
                targets |= {then(op(a, b), c), then(c, op(a, b))} & set(range(1, 61))
        for target in sorted(targets):
            # The split under which the two models were made. On problems drawn at random the teacher would look better
            # than it is: it has seen nine in ten of them.
            held_out = sha256(f"countdown {list(numbers)} {target}".encode()).digest()[0] < 0.1 * 256
            sides[held_out].append(f"{target} from {' '.join(map(str, random.sample(numbers, 3)))} :")
    return sides


def is_right(prompt: str, answer: str) -> bool:
    """Whether every step is true and uses numbers that are there, until only the target is left."""
    target, _, *numbers, _ = prompt.split()
    left = Counter(numbers)
    for step in answer.split(" , "):
        match = re.fullmatch(r"(\d+) ([-+*]) (\d+) = (\d+)", step)
        if match is None or match[4] != str(OPERATIONS[match[2]](int(match[1]), int(match[3]))):
            return False
        left.subtract([match[1], match[3]])
        if min(left.values()) < 0:
            return False
        left[match[4]] += 1
    return +left == Counter([target])


@torch.no_grad()
def write(model, tokenizer, prompts: list[str], max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Step 1: an answer per prompt. Ids [B, L], which of them are no padding, and which of them the model wrote."""
    # Padding goes to the left, so that every answer begins right behind its prompt.
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(model.device)
    ids_BL = model.generate(batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=max_tokens)
    # Trap: the stop token was decided on like any other, so it counts, or nobody learns when to stop. What `generate`
    # fills in behind it does not. Both may have the same id, so look for the first stop, not for what is no padding.
    # (A teacher that stops on another token than the student needs a translation, which is not done here.)
    stops = torch.tensor(model.generation_config.eos_token_id, device=model.device)
    stop_BA = torch.isin(ids_BL[:, batch.input_ids.shape[1] :], stops).int()
    written_BA = stop_BA.cumsum(-1) - stop_BA == 0
    prompt_BL = batch.attention_mask.bool()
    real_BL = torch.cat([prompt_BL, written_BA], dim=1)
    written_BL = torch.cat([torch.zeros_like(prompt_BL), written_BA], dim=1)
    return ids_BL, real_BL, written_BL


def score(model, ids_BL: Tensor, real_BL: Tensor, vocab: int) -> Tensor:
    """Step 2, for student and teacher alike: logits about ids_BL[:, 1:], in one pass."""
    # Positions count real tokens only, as they did while writing.
    positions_BL = (real_BL.cumsum(-1) - 1).clamp_min(0)
    out = model(input_ids=ids_BL, attention_mask=real_BL.long(), position_ids=positions_BL, use_cache=False)
    # Trap: the logits at position t-1 speak of token t. The last ones speak of a token that nobody wrote.
    return out.logits[:, :-1, :vocab]


def kl(p_logp_NV: Tensor, q_logp_NV: Tensor) -> Tensor:
    """KL(P || Q) at each token, summed over all candidates given."""
    return (p_logp_NV.exp() * (p_logp_NV - q_logp_NV)).sum(-1)


def sampled_reverse_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """KL(student || teacher) judged by the one token that was sampled, as a policy gradient."""
    student_logp_N = student_logp_NV.gather(-1, tokens_N[:, None]).squeeze(-1)
    teacher_logp_N = teacher_logp_NV.gather(-1, tokens_N[:, None]).squeeze(-1)
    # Trap: never back-propagate student_logp - teacher_logp itself. Its mean is the reverse KL, but the teacher is not
    # in its gradient, which is 0 on average. The log-ratio is the reward for having sampled this token (its
    # advantage): a fixed number that says which way, and how hard, to push the token's log-prob. Where the token leads
    # the answer later is left out of its reward (discount 0), which makes it far less noisy.
    advantage_N = (teacher_logp_N - student_logp_N).detach()
    # 1 in value, with the gradient of student_logp_N; so the loss also reads as the estimate of the KL. It is PPO's
    # ratio to the student who wrote, which stays 1 because a batch is used for one optimizer step only.
    ratio_N = (student_logp_N - student_logp_N.detach()).exp()
    return -ratio_N * advantage_N


def top_k_forward_kl(student_logp_NV: Tensor, teacher_logp_NV: Tensor, k: int) -> Tensor:
    """KL(teacher || student) on the teacher's k likeliest tokens, the teacher made to sum to 1 on them."""
    top_logp_NK, ids_NK = teacher_logp_NV.topk(min(k, teacher_logp_NV.shape[-1]))
    # The student's softmax stays that over all of V: else nothing would press on what it puts outside the k.
    return kl(top_logp_NK.log_softmax(-1), student_logp_NV.gather(-1, ids_NK))


def distil(method: str, student_logits_BLV, teacher_logits_BLV, tokens_BL, written_BL, threshold=0.8, k=16):
    """Step 3: the loss, and what is worth watching. Logits at l speak of token l; what is not written is not read."""
    # Softmax in fp32, whatever the models compute in. Trap: these two are [N, V]. With a V of 266 that is nothing; with
    # the 150,000 of a real model and long answers it is what fills the memory. This file holds them; Retort does not,
    # it takes a few rows at a time from hidden states to loss.
    student_logp_NV = student_logits_BLV[written_BL].log_softmax(-1, dtype=torch.float32)
    teacher_logp_NV = teacher_logits_BLV[written_BL].log_softmax(-1, dtype=torch.float32).detach()
    teacher_entropy_N = -(teacher_logp_NV.exp() * teacher_logp_NV).sum(-1)
    uncertain_N = teacher_entropy_N > threshold
    if method == "reverse_kl":  # what opd estimates: the student may drop some of the teacher's ways (mode seeking)
        loss_N = kl(student_logp_NV, teacher_logp_NV)
    elif method == "forward_kl":  # the student must give each of the teacher's ways its share (mode covering)
        loss_N = kl(teacher_logp_NV, student_logp_NV)
    else:
        loss_N = sampled_reverse_kl(student_logp_NV, teacher_logp_NV, tokens_BL[written_BL])
    if method == "eopd":
        # Where the teacher sees several good ways, reverse KL is noisy and tends to settle on one of them. So EOPD adds
        # forward KL there. It adds: the reverse KL is never switched off.
        loss_N = loss_N + uncertain_N * top_k_forward_kl(student_logp_NV, teacher_logp_NV, k)
    with torch.no_grad():
        seen = {
            "reverse KL": kl(student_logp_NV, teacher_logp_NV).mean(),
            "forward KL where uncertain": kl(teacher_logp_NV, student_logp_NV)[uncertain_N].mean(),
            "student entropy": -(student_logp_NV.exp() * student_logp_NV).sum(-1).mean(),
            "teacher entropy": teacher_entropy_N.mean(),
            "share uncertain": uncertain_N.float().mean(),
            "length": written_BL.sum() / len(written_BL),
        }
    # Trap: divide by all counted tokens, the forward term too. Divided by the number of uncertain ones it would weigh
    # the more the fewer there are; averaged per answer first, tokens of short answers would weigh more.
    return loss_N.mean(), {name: value.item() for name, value in seen.items()}


def one_batch(student, teacher, tokenizer, prompts: list[str], args) -> tuple[Tensor, dict[str, float]]:
    """Steps 1 to 3: the student answers, both score the answers, and out comes the loss."""
    ids_BL, real_BL, written_BL = write(student, tokenizer, prompts, args.tokens)
    student_logits_BLV = score(student, ids_BL, real_BL, len(tokenizer))
    with torch.no_grad():  # trap: the teacher does not learn, and without this its activations would all be kept
        teacher_logits_BLV = score(teacher, ids_BL, real_BL, len(tokenizer))
    given = student_logits_BLV, teacher_logits_BLV, ids_BL[:, 1:], written_BL[:, 1:]
    loss, seen = distil(args.method, *given, args.threshold, args.top_k)
    if args.prompts is None:
        answers = [tokenizer.decode(ids_BL[b, written_BL[b]], skip_special_tokens=True) for b in range(len(prompts))]
        seen["share right"] = sum(map(is_right, prompts, answers)) / len(prompts)
    return loss, seen


def load(name: str, tokenizer, device: str, dtype: torch.dtype):
    """A model that samples from the very distribution that `score` gives."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True).to(device)
    # Models come with sampling settings of their own (top_k is 50 unless somebody says 0): all set aside. And many
    # output layers are wider than the vocabulary: ids behind its end are padding, and neither written nor scored.
    stops = model.generation_config.eos_token_id or tokenizer.eos_token_id
    padding = list(range(len(tokenizer), model.get_output_embeddings().weight.shape[0]))
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=padding or None,
    )
    return model.eval()  # the student too, while it learns: with dropout it would not be the one that wrote


def main() -> None:
    """Before, training, after."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--method", choices=["opd", "eopd", "reverse_kl", "forward_kl"], default="eopd", help="loss")
    parser.add_argument("--student", default=MODELS / "student", help="a folder or hub name, safetensors")
    parser.add_argument("--teacher", default=MODELS / "teacher", help="the same, with the same tokenizer")
    parser.add_argument("--prompts", type=Path, help="a file, a prompt a line, used as it is (no chat template)")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=128, help="answers a step")
    parser.add_argument("--tokens", type=int, default=14, help="longest answer")
    parser.add_argument("--eval", type=int, default=1284, help="answers before and after")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="falls to 0; real models: about 1e-5")
    parser.add_argument("--threshold", type=float, default=0.8, help="eopd: teacher entropy that counts as uncertain")
    parser.add_argument("--top-k", type=int, default=16, help="eopd: candidates in the forward KL")
    parser.add_argument("--seed", type=int, default=0, help="of all chance")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args, start = parser.parse_args(), time.monotonic()

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    if args.prompts is None:
        torch.set_num_threads(1)  # models this small gain nothing from a second one
        train, held_out = countdown()
    else:
        lines = list(dict.fromkeys(filter(str.strip, args.prompts.read_text(encoding="utf-8").splitlines())))
        train, held_out = [line for i, line in enumerate(lines) if i % 10], lines[::10]
    random.shuffle(held_out)
    held_out = [held_out[i % len(held_out)] for i in range(args.eval)]

    tokenizer = AutoTokenizer.from_pretrained(args.student)
    if tokenizer.get_vocab() != AutoTokenizer.from_pretrained(args.teacher).get_vocab():
        raise SystemExit("student and teacher have different tokenizers: their token ids do not mean the same")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    # The student stays in fp32 everywhere, because bf16 weights would round small updates away.
    student = load(args.student, tokenizer, args.device, torch.float32)
    teacher = load(args.teacher, tokenizer, args.device, torch.float32 if args.device == "cpu" else torch.bfloat16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.steps)

    def show(label: str, seen: dict[str, float]) -> None:
        if label == "before":
            print(" " * 8, *seen, sep="  ")
        print(f"{label:8}", *(f"{value:{len(name)}.3f}" for name, value in seen.items()), sep="  ", flush=True)

    def evaluate(label: str, model) -> None:
        with torch.no_grad():
            show(label, one_batch(model, teacher, tokenizer, held_out, args)[1])

    evaluate("before", student)
    for step in range(1, args.steps + 1):
        loss, seen = one_batch(student, teacher, tokenizer, random.choices(train, k=args.batch), args)
        # Step 4: one optimizer step. The next batch is written by the student that comes out of it.
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            show(f"step {step}", seen)
    evaluate("after", student)
    evaluate("teacher", teacher)  # on answers of its own: divergences of 0, and the share right to aim at
    print(f"{args.method}, {args.steps} steps, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
