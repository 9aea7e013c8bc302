"""The Triton kernels. Importing this module imports Triton; only `retort.kernels.triton_rows` does, on demand.

A program owns one row, or one part of it, and walks it in blocks. Softmax is online: logits are taken relative to the
largest one so far (the peak), and the sums are rescaled when the peak moves. In the names below

    a, b     scaled logits of student and teacher relative to their own peaks, so never above 0
    u, v     exp(a), exp(b): the probabilities but for the normaliser
    gap      a - b

Both peaks drop out of every divergence, so a teacher whose logits are shifted by a constant costs no digits. Two nearly
equal distributions are the hard case: KL is then a small difference of numbers near 1. So the difference of the
normalisers, sum u - sum v, is summed directly, each term by a series where u and v are close.

An impossible id has a = FLOOR instead of -inf: its weight is still exactly 0, and 0 times a finite number is no NaN.
Where that decides about infinity, flags do: bit 0 if the teacher rules out an id of the student's, bit 1 the reverse.
"""
# Triton's language has its own types: pyright does not know them with Triton, and misses them without.
# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportInvalidTypeForm=false
# ruff: noqa: D103, RUF059, SIM108 -- a kernel's branches on constants stand as `if`: Triton drops the other side

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)


@triton.jit
def load_row(base, columns, inside):
    return tl.load(base + columns, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def floored(values):
    # A comparison, not a maximum, which would swallow NaN; NaN must reach the result.
    return tl.where(values < FLOOR, FLOOR, values)


@triton.jit
def expm1_small(x):
    # exp(x) - 1 for |x| < 1/4, to the last digit of fp32; callers pass 0 elsewhere.
    tail = 1.0 / 24.0 + x * (1.0 / 120.0 + x * (1.0 / 720.0 + x * (1.0 / 5040.0)))
    return x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * tail)))


@triton.jit
def exp_difference(a, b, exp_a, exp_b):
    # exp(a) - exp(b) without cancellation.
    close = tl.abs(b - a) < 0.25
    return tl.where(close, -exp_a * expm1_small(tl.where(close, b - a, 0.0)), exp_a - exp_b)


@triton.jit
def climb(x, peak, scale):
    # Returns the new peak (of unscaled logits), its change (scaled), and the logits relative to it. Where x holds NaN
    # or +inf, some element of the last is NaN.
    top = tl.maximum(peak, tl.max(x, axis=0))
    moved = tl.where(peak == float("-inf"), 0.0, (top - peak) * scale)
    relative = floored((x - tl.where(top == float("-inf"), 0.0, top)) * scale)
    return top, moved, relative


@triton.jit
def rescale_pair(moved_s, moved_t, sum_u, sum_ua, sum_v, sum_vb, lead, gap_u, gap_v):
    shrink_s = tl.exp(-moved_s)
    shrink_t = tl.exp(-moved_t)
    apart = moved_s - moved_t
    lead = shrink_s * lead + exp_difference(-moved_s, -moved_t, shrink_s, shrink_t) * sum_v
    gap_u = shrink_s * (gap_u - apart * sum_u)
    gap_v = shrink_t * (gap_v - apart * sum_v)
    sum_ua = shrink_s * (sum_ua - moved_s * sum_u)
    sum_vb = shrink_t * (sum_vb - moved_t * sum_v)
    return shrink_s * sum_u, sum_ua, shrink_t * sum_v, sum_vb, lead, gap_u, gap_v


@triton.jit
def pair_moments(
    student, teacher, partial, vocab, student_stride, teacher_stride, blocks, student_scale, teacher_scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    student += row.to(tl.int64) * student_stride  # rows times vocabulary exceed 2^31
    teacher += row.to(tl.int64) * teacher_stride
    lanes = tl.arange(0, BLOCK)
    peak_s = tl.full((), float("-inf"), tl.float32)
    peak_t = tl.full((), float("-inf"), tl.float32)
    # One sum per lane: threads exchange only the two maxima inside the loop, and sums are shorter.
    sum_u = tl.zeros((BLOCK,), tl.float32)
    sum_ua = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    sum_vb = tl.zeros((BLOCK,), tl.float32)
    lead = tl.zeros((BLOCK,), tl.float32)
    gap_u = tl.zeros((BLOCK,), tl.float32)
    gap_v = tl.zeros((BLOCK,), tl.float32)
    flags = tl.zeros((BLOCK,), tl.int32)
    for block in range(blocks):
        columns = (split * blocks + block) * BLOCK + lanes
        s = load_row(student, columns, columns < vocab)
        t = load_row(teacher, columns, columns < vocab)
        peak_s, moved_s, a = climb(s, peak_s, student_scale)
        peak_t, moved_t, b = climb(t, peak_t, teacher_scale)
        if (moved_s != 0.0) | (moved_t != 0.0):  # rare after the first few blocks
            sum_u, sum_ua, sum_v, sum_vb, lead, gap_u, gap_v = rescale_pair(
                moved_s, moved_t, sum_u, sum_ua, sum_v, sum_vb, lead, gap_u, gap_v
            )
        u = tl.exp(a)
        v = tl.exp(b)
        gap = a - b
        sum_u += u
        sum_ua += u * a
        sum_v += v
        sum_vb += v * b
        lead += exp_difference(a, b, u, v)
        gap_u += u * gap
        gap_v += v * gap
        without_t = (s > float("-inf")) & (t == float("-inf"))
        without_s = (t > float("-inf")) & (s == float("-inf"))
        flags = flags | tl.where(without_t, 1, 0) | tl.where(without_s, 2, 0)
    splits = tl.num_programs(1)
    step = tl.num_programs(0) * splits
    partial += row * splits + split
    tl.store(partial, peak_s)
    tl.store(partial + step, tl.sum(sum_u, axis=0))
    tl.store(partial + 2 * step, tl.sum(sum_ua, axis=0))
    tl.store(partial + 3 * step, peak_t)
    tl.store(partial + 4 * step, tl.sum(sum_v, axis=0))
    tl.store(partial + 5 * step, tl.sum(sum_vb, axis=0))
    tl.store(partial + 6 * step, tl.sum(lead, axis=0))
    tl.store(partial + 7 * step, tl.sum(gap_u, axis=0))
    tl.store(partial + 8 * step, tl.sum(gap_v, axis=0))
    either = tl.max(flags & 1, axis=0) + tl.max(flags & 2, axis=0)
    tl.store(partial + 9 * step, either.to(tl.float32))


@triton.jit
def student_moments(student, partial, vocab, student_stride, blocks, student_scale, BLOCK: tl.constexpr):
    row, split = tl.program_id(0), tl.program_id(1)
    student += row.to(tl.int64) * student_stride
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((), float("-inf"), tl.float32)
    sum_u = tl.zeros((BLOCK,), tl.float32)
    sum_ua = tl.zeros((BLOCK,), tl.float32)
    for block in range(blocks):
        columns = (split * blocks + block) * BLOCK + lanes
        peak, moved, a = climb(load_row(student, columns, columns < vocab), peak, student_scale)
        if moved != 0.0:
            sum_ua = tl.exp(-moved) * (sum_ua - moved * sum_u)
            sum_u = tl.exp(-moved) * sum_u
        u = tl.exp(a)
        sum_u += u
        sum_ua += u * a
    splits = tl.num_programs(1)
    step = tl.num_programs(0) * splits
    partial += row * splits + split
    tl.store(partial, peak)
    tl.store(partial + step, tl.sum(sum_u, axis=0))
    tl.store(partial + 2 * step, tl.sum(sum_ua, axis=0))


@triton.jit
def merge_side(partial, step, lanes, inside, scale):
    # Returns normaliser, log-sum-exp and entropy of one model, and the factors that bring each part of the row to the
    # common peak. Computed in float64: a few numbers per row, whose differences matter.
    peaks = tl.load(partial + lanes, mask=inside, other=float("-inf")).to(tl.float64)
    sums = tl.load(partial + step + lanes, mask=inside, other=0.0).to(tl.float64)
    moments = tl.load(partial + 2 * step + lanes, mask=inside, other=0.0).to(tl.float64)
    peak = tl.max(peaks, axis=0)
    moved = tl.where(peaks == float("-inf"), 0.0, (peak - peaks) * scale)
    shrink = tl.exp(-moved)
    total = tl.sum(shrink * sums, axis=0)
    moment = tl.sum(shrink * (moments - moved * sums), axis=0)
    return total, peak * scale + tl.log(total), tl.log(total) - moment / total, moved, shrink, sums


@triton.jit
def merge_student(partial, out, splits, student_scale, SPLITS: tl.constexpr):
    row, rows = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, SPLITS)
    total, lse, entropy, moved, shrink, sums = merge_side(
        partial + row * splits, rows * splits, lanes, lanes < splits, student_scale
    )
    tl.store(out + row, lse.to(tl.float32))
    tl.store(out + rows + row, entropy.to(tl.float32))


@triton.jit
def merge_pair(partial, out, splits, student_scale, teacher_scale, SPLITS: tl.constexpr):
    row, rows = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, SPLITS)
    inside = lanes < splits
    step = rows * splits
    partial += row * splits
    total_s, lse_s, entropy_s, moved_s, shrink_s, sums_s = merge_side(partial, step, lanes, inside, student_scale)
    total_t, lse_t, entropy_t, moved_t, shrink_t, sums_t = merge_side(
        partial + 3 * step, step, lanes, inside, teacher_scale
    )
    leads = tl.load(partial + 6 * step + lanes, mask=inside, other=0.0).to(tl.float64)
    gaps_u = tl.load(partial + 7 * step + lanes, mask=inside, other=0.0).to(tl.float64)
    gaps_v = tl.load(partial + 8 * step + lanes, mask=inside, other=0.0).to(tl.float64)
    flags = tl.load(partial + 9 * step + lanes, mask=inside, other=0.0).to(tl.int32)
    apart = moved_s - moved_t
    lead = tl.sum(shrink_s * leads + (shrink_s - shrink_t) * sums_t, axis=0)
    mean_u = tl.sum(shrink_s * (gaps_u - apart * sums_s), axis=0) / total_s
    mean_v = tl.sum(shrink_t * (gaps_v - apart * sums_t), axis=0) / total_t
    # log(total_s / total_t), from their difference where they are close.
    share = lead / total_s
    close = tl.abs(share) < 0.5
    ratio = tl.where(close, -tl.log(1.0 - tl.where(close, share, 0.0)), tl.log(total_s) - tl.log(total_t))
    known = (total_s > 0.0) & (total_t > 0.0)  # neither NaN nor a row of -inf
    without_t = tl.max(flags & 1, axis=0) > 0
    without_s = tl.max(flags & 2, axis=0) > 0
    reverse = tl.where(known, tl.where(without_t, float("inf"), mean_u - ratio), float("nan"))
    forward = tl.where(known, tl.where(without_s, float("inf"), ratio - mean_v), float("nan"))
    tl.store(out + row, lse_s.to(tl.float32))
    tl.store(out + rows + row, entropy_s.to(tl.float32))
    tl.store(out + 2 * rows + row, lse_t.to(tl.float32))
    tl.store(out + 3 * rows + row, entropy_t.to(tl.float32))
    tl.store(out + 4 * rows + row, reverse.to(tl.float32))
    tl.store(out + 5 * rows + row, forward.to(tl.float32))


@triton.jit
def logs_to_mixture(logp, logq, weight):
    # log(p / m) and log(q / m) with m = w q + (1 - w) p. Where p and q are close, by
    # log1p(z) = 2 atanh(z / (2 + z)) with z = w (q / p - 1).
    away = logq - logp
    close = tl.abs(away) < 0.25
    z = weight * expm1_small(tl.where(close, away, 0.0))
    r = z / (2.0 + z)
    r2 = r * r
    near = -2.0 * r * (1.0 + r2 * (1.0 / 3.0 + r2 * (1.0 / 5.0 + r2 * (1.0 / 7.0 + r2 * (1.0 / 9.0)))))
    weight = tl.full((), weight, tl.float32)  # the interpreter leaves an argument a Python float
    left = logp + tl.log(1.0 - weight)
    right = logq + tl.log(weight)
    mixture = tl.maximum(left, right) + tl.log(1.0 + tl.exp(-tl.abs(left - right)))
    # Where they are not close, one may be FLOOR: the other side's logarithm must not be a sum with it.
    return tl.where(close, near, logp - mixture), tl.where(close, near + away, logq - mixture)


@triton.jit
def jsd_moments(
    student, teacher, student_lse, teacher_lse, partial, vocab, student_stride, teacher_stride, blocks,
    student_scale, teacher_scale, weight, BLOCK: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    student += row.to(tl.int64) * student_stride
    teacher += row.to(tl.int64) * teacher_stride
    lse_s, lse_t = tl.load(student_lse + row), tl.load(teacher_lse + row)
    lanes = tl.arange(0, BLOCK)
    jsd = tl.zeros((BLOCK,), tl.float32)
    mixture = tl.zeros((BLOCK,), tl.float32)
    for block in range(blocks):
        columns = (split * blocks + block) * BLOCK + lanes
        logp = floored(load_row(student, columns, columns < vocab) * student_scale - lse_s)
        logq = floored(load_row(teacher, columns, columns < vocab) * teacher_scale - lse_t)
        p = tl.exp(logp)
        q = tl.exp(logq)
        ours, theirs = logs_to_mixture(logp, logq, weight)
        jsd += weight * q * theirs + (1.0 - weight) * p * ours
        mixture += p * ours
    splits = tl.num_programs(1)
    step = tl.num_programs(0) * splits
    partial += row * splits + split
    tl.store(partial, tl.sum(jsd, axis=0))
    tl.store(partial + step, tl.sum(mixture, axis=0))


@triton.jit
def row_number(pointer, row):
    if pointer is None:
        number = 0.0
    else:
        number = tl.load(pointer + row).to(tl.float32)
    return number


@triton.jit
def slope(
    s, t, row, student_lse, entropy, teacher_lse, reverse, mixture,
    pull_grad, entropy_grad, reverse_grad, forward_grad, jsd_grad,
    student_scale, teacher_scale, weight,
):  # fmt: skip
    # Gradient of the row's numbers with respect to scaled logits, without the onehot of given ids.
    logp = floored(s * student_scale - tl.load(student_lse + row))
    p = tl.exp(logp)
    inner = row_number(pull_grad, row) + tl.zeros_like(p)
    if entropy_grad is not None:
        inner -= row_number(entropy_grad, row) * (logp + tl.load(entropy + row))
    after = tl.zeros_like(p)
    # One return at the end: Triton compiles the code behind a return in a branch on constants.
    if t is not None:
        logq = floored(t * teacher_scale - tl.load(teacher_lse + row))
        if reverse_grad is not None:
            share = row_number(reverse_grad, row)
            value = tl.load(reverse + row)
            value = tl.where(value == float("inf"), float("nan"), value)
            inner += share * (logp - logq - tl.where(share == 0.0, 0.0, value))
        if jsd_grad is not None:
            part = row_number(jsd_grad, row) * (1.0 - weight)
            ours, theirs = logs_to_mixture(logp, logq, weight)
            inner += part * (ours - tl.load(mixture + row))
        if forward_grad is not None:
            after = row_number(forward_grad, row) * exp_difference(logp, logq, p, tl.exp(logq))
    return p * inner + after


@triton.jit
def gradient(
    student, teacher, out, vocab, student_stride, teacher_stride, out_stride,
    student_lse, entropy, teacher_lse, reverse, mixture,
    pull_grad, entropy_grad, reverse_grad, forward_grad, jsd_grad,
    student_scale, teacher_scale, weight, BLOCK: tl.constexpr,
):  # fmt: skip
    # `out` may be `student`: a program reads an element before it overwrites it, and no other program reads it.
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < vocab
    s = load_row(student + row.to(tl.int64) * student_stride, columns, inside)
    if teacher is None:
        t = None
    else:
        t = load_row(teacher + row.to(tl.int64) * teacher_stride, columns, inside)
    values = slope(
        s, t, row, student_lse, entropy, teacher_lse, reverse, mixture,
        pull_grad, entropy_grad, reverse_grad, forward_grad, jsd_grad, student_scale, teacher_scale, weight,
    )  # fmt: skip
    target = out + row.to(tl.int64) * out_stride + columns
    tl.store(target, (values * student_scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gradient_at_ids(
    student_at, teacher_at, ids, ids_grad, out, kept, out_stride,
    student_lse, entropy, teacher_lse, reverse, mixture,
    pull_grad, entropy_grad, reverse_grad, forward_grad, jsd_grad,
    student_scale, teacher_scale, weight, BLOCK: tl.constexpr,
):  # fmt: skip
    # Computes the whole gradient at given ids anew: adding to the result of `gradient` would round it twice, and in
    # bf16 g - g p has no digits left where p is near 1. All [C, K] tensors are contiguous.
    row = tl.program_id(0)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < kept
    offsets = row.to(tl.int64) * kept + lanes
    s = load_row(student_at, offsets, inside)
    if teacher_at is None:
        t = None
    else:
        t = load_row(teacher_at, offsets, inside)
    values = slope(
        s, t, row, student_lse, entropy, teacher_lse, reverse, mixture,
        pull_grad, entropy_grad, reverse_grad, forward_grad, jsd_grad, student_scale, teacher_scale, weight,
    )  # fmt: skip
    values += tl.load(ids_grad + offsets, mask=inside, other=0.0)
    target = out + row.to(tl.int64) * out_stride + tl.load(ids + offsets, mask=inside, other=0)
    tl.store(target, (values * student_scale).to(out.dtype.element_ty), mask=inside)
