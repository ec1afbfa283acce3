import os
import warnings
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from fastcore.basics import patch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .kernels import product
from .model import MatryoshkaSAE
from .ranks import Ranks

#--
def has_triton() -> bool:
    """Whether Triton's kernels can run here: on a card, or on a processor by its interpreter (`TRITON_INTERPRET=1`); never with `SAERAD_TRITON=0`."""
    able = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    return able and os.environ.get("SAERAD_TRITON") != "0" and find_spec("triton") is not None

#--
if has_triton():
    import triton
    import triton.language as tl
    jit = triton.jit
else:
    triton, jit = None, lambda function: function
    class tl: constexpr = int      # all that the signatures below name

#--
@jit
def tile(n, width, R: tl.constexpr, B: tl.constexpr):
    "This program's block of a matrix [n, width]: its rows and columns, where its numbers lie, and which of them are inside."
    row, col = tl.program_id(1) * R + tl.arange(0, R), tl.program_id(0) * B + tl.arange(0, B)
    return row, col, row[:, None].to(tl.int64) * width + col[None, :], (row[:, None] < n) & (col[None, :] < width)

@jit
def read(pre, bias, at, col, inside, width):
    "The activations of a block before selection."
    return tl.load(pre + at, inside, 0.0) + tl.load(bias + col, col < width, 0.0)[None, :]

#--
@jit
def gather_kernel(pre, bias, floor, out, count, n, width, capacity, R: tl.constexpr, B: tl.constexpr):
    "What is positive and not below `floor` goes to `out`, in any order; `count` says how many there are in all."
    row, col, at, inside = tile(n, width, R, B)
    value = read(pre, bias, at, col, inside, width)
    wanted = (inside & (value > 0) & (value >= tl.load(floor))).to(tl.int32)
    in_row = tl.sum(wanted, 1)
    before = tl.atomic_add(count, tl.sum(in_row, 0)) + tl.cumsum(in_row, 0) - in_row
    place = before[:, None] + tl.cumsum(wanted, 1) - 1
    tl.store(out + place, value, (wanted > 0) & (place < capacity))

#--
@jit
def digits_kernel(needed, pre, bias, prefix, counts, n, width, SHIFT: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    "How many positive numbers that begin with the bits `prefix` have each value of the next eight bits."
    if tl.load(needed) > 0:
        row, col, at, inside = tile(n, width, R, B)
        value = read(pre, bias, at, col, inside, width)
        bits, counted = value.to(tl.int32, bitcast=True), inside & (value > 0)
        if SHIFT < 24: counted = counted & ((bits >> (SHIFT + 8)) == tl.load(prefix))
        digits = tl.reshape((bits >> SHIFT) & 255, (R * B,))
        tl.atomic_add(counts + tl.arange(0, 256), tl.histogram(digits, 256, mask=tl.reshape(counted, (R * B,))))

#--
@jit
def pick_kernel(needed, counts, prefix, left):
    "The eight bits of the number that has `left` numbers from it on upwards; 0 where there are fewer."
    if tl.load(needed) > 0:
        digit = tl.arange(0, 256)
        here, want = tl.load(counts + digit), tl.load(left)
        upwards = tl.sum(here, 0) - tl.cumsum(here, 0) + here
        found = tl.sum((upwards >= want).to(tl.int32), 0) - 1
        tl.store(prefix, tl.where(found >= 0, tl.load(prefix) * 256 + found, 0))
        tl.store(left, tl.where(found >= 0, want - tl.sum(tl.where(digit > found, here, 0), 0), want))
        tl.store(counts + digit, tl.zeros_like(here))

#--
TILE = {"R": 16, "B": 128}

def tiles(n: int, width: int) -> tuple[int, int]:
    """How many programs a matrix [n, width] takes, by column and by row."""
    return -(-width // TILE["B"]), -(-n // TILE["R"])

#--
class Cut:
    """The `want`-th largest positive number of `pre + bias`, found on the device without asking it anything; 0 where fewer are positive."""
    def __init__(self, device: Any, spare: float = 2.0):
        self.guess, self.spare = torch.zeros(1, device=device), spare      # the last cut; what there is space for, as a multiple of `want`

    def __call__(self, pre: Float[Tensor, "n width"], bias: Float[Tensor, " width"], want: int) -> Float[Tensor, " 1"]:
        """Exact, whatever the last cut was; that only decides how fast it is found."""
        (n, width), device, capacity = pre.shape, pre.device, min(int(self.spare * want), pre.numel())
        candidates, count = torch.zeros(capacity, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        gather_kernel[tiles(n, width)](pre, bias, 0.9 * self.guess, candidates, count, n, width, capacity, **TILE)
        needed = ((count > capacity) | (count < want)).int()
        slow, fast = self.by_digits(pre, bias, want, needed), candidates.sort(descending=True).values[want - 1:want]
        self.guess.copy_(torch.where(needed > 0, slow, fast))
        return self.guess.clone()

    def by_digits(self, pre: Float[Tensor, "n width"], bias: Float[Tensor, " width"], want: int, needed: Int[Tensor, " 1"]) -> Float[Tensor, " 1"]:
        """The same from eight bits after eight of all numbers; nothing is read, and the answer means nothing, unless it is `needed`."""
        (n, width), like = pre.shape, {"dtype": torch.int32, "device": pre.device}
        counts, prefix, left = torch.zeros(256, **like), torch.zeros(1, **like), torch.full((1,), want, **like)
        for shift in (24, 16, 8, 0):
            digits_kernel[tiles(n, width)](needed, pre, bias, prefix, counts, n, width, SHIFT=shift, **TILE)
            pick_kernel[(1,)](needed, counts, prefix, left)
        return prefix.view(torch.float32)

#--
@jit
def select_kernel(pre, bias, cut, cut_step, z, fired, kept, least, n, width, R: tl.constexpr, B: tl.constexpr):
    "A block of R rows and B features: what is not below the cut, which features that are, how many there are, and the smallest."
    row, col, at, inside = tile(n, width, R, B)
    value = read(pre, bias, at, col, inside, width)
    on = inside & (value > 0) & (value >= tl.load(cut + row * cut_step, row < n, 0.0)[:, None])
    tl.store(z + at, tl.where(on, value, 0.0).to(z.dtype.element_ty), inside)
    tl.store(fired + col, tl.full((B,), 1, tl.int8), (tl.max(on.to(tl.int32), 0) > 0) & (col < width))
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(kept + block, tl.sum(tl.sum(on.to(tl.int32), 1), 0))
    tl.store(least + block, tl.min(tl.min(tl.where(on, value, float("inf")), 1), 0))

#--
def select(pre: Float[Tensor, "n width"], bias: Float[Tensor, " width"], cut: Float[Tensor, " rows"],
           dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What of `pre + bias` is positive and not below the cut (one number, or one a row): activations [n, width] in `dtype`, 0 elsewhere;
    int8 [width], 1 where a feature is on; how many are on; the smallest of them (0 where none is)."""
    (n, width), device, grid = pre.shape, pre.device, tiles(*pre.shape)
    z, fired = torch.empty(n, width, dtype=dtype, device=device), torch.zeros(width, dtype=torch.int8, device=device)
    kept, least = torch.empty(grid[0] * grid[1], dtype=torch.int32, device=device), torch.empty(grid[0] * grid[1], device=device)
    select_kernel[grid](pre, bias, cut, int(len(cut) > 1), z, fired, kept, least, n, width, **TILE)
    smallest = least.min()
    return z, fired, kept.sum(), torch.where(smallest.isinf(), 0.0, smallest)

#--
@jit
def errors_kernel(x, b_dec, shares, at_group, residual, squares, weights, size, d, GROUPS: tl.constexpr, B: tl.constexpr):
    "A block of numbers of `x`: the errors of all levels, their squares, and every group's gradient, which is a sum over the levels from it on."
    block, at = tl.program_id(0), tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = at < size
    error = tl.load(b_dec + at % d, inside, 0.0) - tl.load(x + at, inside, 0.0)
    for g in tl.static_range(GROUPS):
        error += tl.load(shares + g * size + at, inside, 0.0).to(tl.float32)
        tl.store(squares + block * GROUPS + g, tl.sum(tl.where(inside, error * error, 0.0), 0))
    tl.store(residual + at, -error, inside)
    total = tl.zeros((B,), tl.float32)
    for i in tl.static_range(GROUPS):
        g = GROUPS - 1 - i
        total += error * tl.load(weights + g)
        tl.store(at_group + g * size + at, total.to(at_group.dtype.element_ty), inside)
        error -= tl.load(shares + g * size + at, inside, 0.0).to(tl.float32)

#--
def errors(x: Float[Tensor, "n d"], b_dec: Float[Tensor, " d"], shares: Float[Tensor, "groups n d"],
           level_weights: Float[Tensor, " groups"]) -> tuple[Tensor, Tensor, Tensor]:
    """From the groups' shares of the reconstruction: the gradient by each group's share [groups, n, d], the residual [n, d] and each level's
    squared error (summed over dimensions, mean over tokens)."""
    groups, n, d = shares.shape
    blocks = -(-n * d // 1024)
    at_group, residual, squares = torch.empty_like(shares), torch.empty_like(x), torch.empty(blocks, groups, device=x.device)
    errors_kernel[(blocks,)](x, b_dec, shares, at_group, residual, squares, level_weights * (2 / n), n * d, d, GROUPS=groups, B=1024)
    return at_group, residual, squares.sum(0) / n

#--
@jit
def slopes_kernel(slope, z, sums, n, width, R: tl.constexpr, B: tl.constexpr):
    "A block of R rows and B features: the slopes stay where a feature is on; `sums` [row blocks, width] gets what remains, added up by feature."
    row, col, at, inside = tile(n, width, R, B)
    on = tl.load(z + at, inside, 0.0).to(tl.float32) > 0
    value = tl.where(on, tl.load(slope + at, inside, 0.0).to(tl.float32), 0.0)
    tl.store(slope + at, value.to(slope.dtype.element_ty), inside)
    tl.store(sums + tl.program_id(1) * width + col, tl.sum(value, 0), col < width)

#--
def mask_slopes(slope: Float[Tensor, "n width"], z: Float[Tensor, "n width"]) -> Float[Tensor, " width"]:
    """Zero the slopes, in place, where no feature is on; returns their sum by feature, which is the gradient of the encoder's bias."""
    (n, width), grid = slope.shape, tiles(*slope.shape)
    sums = torch.empty(grid[1], width, device=slope.device)
    slopes_kernel[grid](slope, z, sums, n, width, **TILE)
    return sums.sum(0)

#--
@jit
def lengths_kernel(grad, weight, along, square, d, D: tl.constexpr, ON_SPHERE: tl.constexpr):
    "One feature: the squared length of its gradient; of a decoder row that of the part across the row, and how much lies along it."
    row, col = tl.program_id(0), tl.arange(0, D)
    at, inside = row.to(tl.int64) * d + col, col < d
    g = tl.load(grad + at, inside, 0.0).to(tl.float32)
    if ON_SPHERE:
        w = tl.load(weight + at, inside, 0.0)
        part = tl.sum(g * w, 0)
        tl.store(along + row, part)
        g -= part * w
    tl.store(square + row, tl.sum(g * g, 0))

#--
@jit
def adam_rule(p, g, m, v, now, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    "Adam for one block of numbers: the new parameter and moments. `now` begins with the rate and 1/√ of the moments' shares of the whole."
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    return p - tl.load(now) * m / (tl.sqrt(v) * tl.load(now + 1) + EPS), m, v

#--
@jit
def rows_kernel(grad, weight, first, second, rounded, along, clip, now, d, D: tl.constexpr, ON_SPHERE: tl.constexpr, ROUND: tl.constexpr,
                BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    "One feature: its gradient (of a decoder row the part across it), clipped, through Adam into weight and moments; length 1; a rounded copy."
    row, col = tl.program_id(0), tl.arange(0, D)
    at, inside = row.to(tl.int64) * d + col, col < d
    g, w = tl.load(grad + at, inside, 0.0).to(tl.float32), tl.load(weight + at, inside, 0.0)
    if ON_SPHERE: g -= tl.load(along + row) * w
    g *= tl.load(clip)
    w, m, v = adam_rule(w, g, tl.load(first + at, inside, 0.0), tl.load(second + at, inside, 0.0), now, BETA1, BETA2, EPS)
    if ON_SPHERE: w /= tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), 0))
    tl.store(first + at, m, inside)
    tl.store(second + at, v, inside)
    tl.store(weight + at, w, inside)
    if ROUND: tl.store(rounded + at, w.to(rounded.dtype.element_ty), inside)

#--
@jit
def bias_kernel(grad, bias, first, second, clip, now, n, B: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    "A block of a bias: Adam."
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < n
    p, m, v = adam_rule(tl.load(bias + at, inside, 0.0), tl.load(grad + at, inside, 0.0) * tl.load(clip), tl.load(first + at, inside, 0.0),
                        tl.load(second + at, inside, 0.0), now, BETA1, BETA2, EPS)
    tl.store(bias + at, p, inside)
    tl.store(first + at, m, inside)
    tl.store(second + at, v, inside)

#--
def dead_places(dead: Bool[Tensor, " width"], capacity: int) -> tuple[Int[Tensor, " capacity"], Bool[Tensor, " capacity"]]:
    """The numbers of the dead features in `capacity` places, and which of the places are taken; no number goes to the host."""
    place = torch.where(dead, dead.cumsum(0) - 1, capacity)
    held = torch.zeros(capacity + 1, dtype=torch.int64, device=dead.device).scatter_(0, place, torch.arange(len(dead), device=dead.device))
    return held[:capacity], torch.arange(capacity, device=dead.device) < dead.sum()

#--
class DeadBound:
    """At most how many features are dead, known on the host without waiting for the device.

    A feature that fires never is dead when it has been silent for `limit` tokens; so one that will be dead within the next tokens is known by now.
    """
    def __init__(self, since: Int[Tensor, " width"], limit: float, every: int = 8):
        self.since, self.limit, self.every = since, limit, every
        self.seen, self.steps, self.until, self.most = 0, 0, -1, 0         # tokens and steps so far; up to which token `most` is right
        self.coming: tuple[int, Tensor, Any] | None = None

    def ask(self, tokens: int) -> tuple[int, Tensor, Any]:
        """Have the device count what may be dead during the next `tokens`: until when it holds, where it will stand, and when it does."""
        may = (self.since > self.limit - tokens).sum()
        if not may.is_cuda: return self.seen + tokens, may, None
        there, ready = torch.empty((), dtype=may.dtype, pin_memory=True), torch.cuda.Event()
        there.copy_(may, non_blocking=True)
        ready.record()
        return self.seen + tokens, there, ready

    def take(self, answer: tuple[int, Tensor, Any]) -> None:
        """Use an answer; waits where it is not there yet."""
        self.until, there, ready = answer
        if ready is not None: ready.synchronize()
        self.most = int(there)

    def __call__(self, tokens: int) -> int:
        """The bound for a step on so many tokens that begins now."""
        if self.coming and self.steps % self.every == 0:
            self.take(self.coming)
            self.coming = None
        if self.seen > self.until: self.take(self.ask(2 * self.every * tokens))
        if self.coming is None: self.coming = self.ask(2 * self.every * tokens)
        self.seen, self.steps = self.seen + tokens, self.steps + 1
        return self.most

#--
class FusedEngine:
    """Steps of a `Trainer` on a card: dense products, everything between them in a few passes, and nothing that comes back to the host.

    For float32 weights and the kinds named here, in one process. After a few steps a step is one CUDA graph (`SAERAD_GRAPHS=0`: never).
    """
    name, kinds, counts = "fused", ("batch_topk", "topk"), True      # counts: it does what `Trainer.update_counters` does itself

    def __init__(self, trainer: Any):
        self.trainer, self.sae, self.cfg = trainer, trainer.sae, trainer.cfg
        device = self.sae.W_dec.device
        self.dtype = torch.bfloat16 if trainer.use_bf16 else torch.float32          # of what is multiplied
        self.cut, self.level_weights = Cut(device), torch.tensor(self.sae.level_weights, device=device)
        self.schedule = self.numbers_of_steps().to(device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)                  # number of the step, on the device
        self.next_step: int | None = None                                           # and on the host; None: look at everything again
        self.batches: dict[int, Tensor] = {}
        self.graphs: dict[tuple[int, int], Any] = {}
        self.graph_pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None     # of all graphs: no two run at a time
        self.runs: Counter = Counter()

    @classmethod
    def supports(cls, kind: str) -> bool:
        """Whether it can train an SAE of this kind."""
        return kind in cls.kinds

    @classmethod
    def refuses(cls, sae: MatryoshkaSAE, ranks: Ranks) -> str:
        """Why it cannot work here; empty where it can."""
        device = sae.W_dec.device
        if triton is None or not (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"): return "needs Triton and a card"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0): return "needs a card of compute capability 8.0"
        return "" if ranks.size == 1 and sae.W_dec.dtype == torch.float32 else "works in one process on float32 weights"

    # what a trainer asks of every engine
    def normalise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Raw vectors in the SAE's units, valid until the next batch comes; always at the same place, as a graph needs."""
        if len(x) not in self.batches: self.batches[len(x)] = torch.empty_like(x)
        return torch.div(x, self.sae.scale, out=self.batches[len(x)])

    def new_moment(self, p: Tensor) -> Tensor:
        """A moment of Adam for a parameter."""
        return torch.zeros_like(p)

    def to_rows(self, name: str, moment: Tensor) -> Tensor:
        """A moment of the parameter `name`, laid out like it."""
        return moment

    def from_rows(self, name: str, saved: Tensor, out: Tensor) -> None:
        """Put a moment that is laid out like the parameter `name` into `out`."""
        out.copy_(saved)

#--
@patch
def numbers_of_steps(self: FusedEngine) -> Float[Tensor, "steps 3"]:
    """For every step: the rate over the first moment's share of the whole, 1/√ of the second's, and whether the threshold is averaged."""
    cfg, (beta1, beta2) = self.cfg, self.cfg.betas
    return torch.tensor([[cfg.rate(i, self.sae.width) / (1 - beta1 ** (i + 1)), (1 - beta2 ** (i + 1)) ** -0.5,
                          float(i >= cfg.threshold_start * cfg.steps)] for i in range(cfg.steps)])

#--
@patch
def look_again(self: FusedEngine) -> None:
    """Take up what somebody else has changed: the number of the step, the weights, the counters."""
    sae, limit = self.sae, self.cfg.dead_after * self.cfg.steps * self.cfg.batch_size
    self.at.fill_(self.trainer.step)
    self.bound = DeadBound(self.trainer.tokens_since_fired, limit)
    fresh = [sae.W_enc.detach().T.to(self.dtype), sae.W_dec.detach().to(self.dtype)]
    if self.next_step is None: self.rounded = fresh
    elif self.dtype != torch.float32:
        for old, new in zip(self.rounded, fresh, strict=True): old.copy_(new)       # where a graph will look for them
    self.versions = self.seen_versions()

@patch
def seen_versions(self: FusedEngine) -> tuple[int, int]:
    """Changes when torch writes to a weight; the kernels write past it."""
    return self.sae.W_enc._version, self.sae.W_dec._version

#--
@patch
@torch.no_grad()
def whole_step(self: FusedEngine, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step on a normalised batch, counters and all: each level's error, AuxK, how many activations were kept, how many features were dead."""
    if self.next_step != self.trainer.step or self.versions != self.seen_versions(): self.look_again()
    self.next_step = self.trainer.step + 1
    return self.run(x, self.capacity(self.bound(len(x))))

@patch
def capacity(self: FusedEngine, most: int) -> int:
    """Places for dead features in AuxK: a power of two, so that there are few different steps; 0 where none can be dead."""
    if not most or not self.cfg.aux_alpha: return 0
    return min(max(64, 1 << (most - 1).bit_length()), self.sae.width)

#--
@patch
def compute(self: FusedEngine, x: Float[Tensor, "n d"], capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a step is, kernel after kernel; see `whole_step`."""
    sae, fast, (H_enc, H_dec) = self.sae, self.dtype != torch.float32, self.rounded
    groups, n = list(pairwise([0, *sae.prefixes])), len(x)
    now, since = self.schedule.index_select(0, self.at.clamp(max=self.cfg.steps - 1))[0], self.trainer.tokens_since_fired
    dead = since > self.bound.limit
    # forward
    centred = (x - sae.b_dec).to(self.dtype)
    pre = product(centred, H_enc.T, fast)
    z, fired, kept, cut = select(pre, sae.b_enc, self.find_cut(pre), self.dtype)
    shares = torch.empty(len(groups), *x.shape, dtype=self.dtype, device=x.device)
    for g, (a, b) in enumerate(groups): torch.mm(z[:, a:b], H_dec[a:b], out=shares[g])
    at_group, residual, levels = errors(x, sae.b_dec, shares, self.level_weights)
    # backward
    slope, grad_dec = torch.empty_like(z), torch.empty_like(H_dec)
    for g, (a, b) in enumerate(groups):
        torch.mm(at_group[g], H_dec[a:b].T, out=slope[:, a:b])
        torch.mm(z[:, a:b].T, at_group[g], out=grad_dec[a:b])
    b_enc = mask_slopes(slope, z)
    grads = {"W_enc": slope.T @ centred, "W_dec": grad_dec, "b_enc": b_enc,
             "b_dec": at_group[0].sum(0, dtype=torch.float32) - b_enc @ sae.W_enc.T}
    aux = self.revive(pre, centred, residual, dead, capacity, grads) if capacity else torch.zeros((), device=x.device)
    self.update(grads, now)
    self.count(fired, cut, now, n)
    return levels, aux, kept, dead.sum()

#--
@patch
def find_cut(self: FusedEngine, pre: Float[Tensor, "n width"]) -> Float[Tensor, " rows"]:
    """Below which nothing is kept: one number for the batch, or one for each token where the kind is `topk`."""
    n, k = len(pre), min(self.sae.k, self.sae.width)
    if self.sae.kind == "topk": return (pre + self.sae.b_enc).topk(k, dim=1, sorted=False).values.amin(1)
    return self.cut(pre, self.sae.b_enc.detach(), n * k)

#--
@patch
def revive(self: FusedEngine, pre: Tensor, centred: Tensor, residual: Tensor, dead: Tensor, capacity: int, grads: dict[str, Tensor]) -> Tensor:
    """Add the gradients of AuxK, in `capacity` places for dead features of which those that are not needed hold zeros; returns its value."""
    sae, fast, k, (at, real) = self.sae, self.dtype != torch.float32, self.trainer.aux_k, dead_places(dead, capacity)
    W_dec = self.rounded[1][at]
    z = (pre[:, at] + sae.b_enc[at]).relu_() * real
    if k < capacity: z *= z >= z.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    unexplained = residual - product(z, W_dec, fast)
    total = (residual - residual.mean(0)).square().sum().clamp_min(torch.finfo(residual.dtype).tiny)
    value = torch.where(real.any(), unexplained.square().sum() / total, 0.0)
    back = unexplained.mul_(-2 * self.cfg.aux_alpha / total)
    slope = product(back, W_dec.T, fast) * (z > 0)
    b_enc = slope.sum(0)
    for name, rows in (("W_enc", product(slope.T, centred, fast)), ("W_dec", product(z.T, back, fast)), ("b_enc", b_enc)):
        grads[name].index_add_(0, at, rows.to(grads[name].dtype))
    grads["b_dec"] -= b_enc @ sae.W_enc.T[at]
    return value

#--
@patch
def update(self: FusedEngine, grads: dict[str, Tensor], now: Float[Tensor, " 3"]) -> None:
    """Clip all gradients together and take Adam's step, with the decoder's rows kept at length 1."""
    sae, state, d, width = self.sae, self.trainer.optimizer.state, self.sae.d, self.sae.width
    shape, betas = {"D": triton.next_power_of_2(d), "num_warps": 8 if d > 1024 else 4}, dict(BETA1=self.cfg.betas[0], BETA2=self.cfg.betas[1], EPS=1e-8)
    along, square = torch.empty(width, device=now.device), torch.empty(2, width, device=now.device)
    rows = [(sae.W_enc, self.rounded[0], False), (sae.W_dec, self.rounded[1], True)]
    for (_, grad), (p, _, on_sphere), out in zip(list(grads.items())[:2], rows, square, strict=True):
        lengths_kernel[(width,)](grad, in_rows(p), along, out, d, ON_SPHERE=on_sphere, **shape)
    length = (square.sum() + grads["b_enc"].square().sum() + grads["b_dec"].square().sum()).sqrt()
    clip = torch.where(length > self.cfg.clip, self.cfg.clip / length, 1.0)
    for (_, grad), (p, rounded, on_sphere) in zip(list(grads.items())[:2], rows, strict=True):
        m, v = (in_rows(state[p][key]) for key in ("exp_avg", "exp_avg_sq"))
        rows_kernel[(width,)](grad, in_rows(p), m, v, rounded, along, clip, now, d, ON_SPHERE=on_sphere, ROUND=self.dtype != torch.float32, **shape, **betas)
    for p, grad in ((sae.b_enc, grads["b_enc"]), (sae.b_dec, grads["b_dec"])):
        bias_kernel[(-(-len(p) // 1024),)](grad, p.detach(), state[p]["exp_avg"], state[p]["exp_avg_sq"], clip, now, len(p), B=1024, **betas)
    for p in sae.parameters(): state[p]["step"] += 1

def in_rows(t: Tensor) -> Tensor:
    """A matrix of features as it lies in memory, a row for each."""
    return t.detach() if t.is_contiguous() else t.detach().T

#--
@patch
def count(self: FusedEngine, fired: Int[Tensor, " width"], cut: Float[Tensor, ""], now: Float[Tensor, " 3"], tokens: int) -> None:
    """How long each feature has been silent, the threshold and the number of the step, after a step on so many tokens."""
    since, old, beta = self.trainer.tokens_since_fired, self.sae.threshold, self.cfg.threshold_beta
    since.add_(tokens).mul_(fired == 0)
    averaged = torch.where(old < 0, cut, beta * old + (1 - beta) * cut)
    old.copy_(torch.where(now[2] > 0, averaged, old))
    self.at += 1

#--
@patch
def run(self: FusedEngine, x: Float[Tensor, "n d"], capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compute`, after three times with these sizes as a CUDA graph: then a step costs the host one call."""
    key = len(x), capacity
    self.runs[key] += 1
    if not x.is_cuda or self.runs[key] <= 3 or os.environ.get("SAERAD_GRAPHS") == "0": return self.compute(x, capacity)
    if key not in self.graphs: self.graphs[key] = self.capture(x, capacity)
    if self.graphs[key] is None: return self.compute(x, capacity)
    graph, result = self.graphs[key]
    graph.replay()
    return result

@patch
def capture(self: FusedEngine, x: Float[Tensor, "n d"], capacity: int) -> Any:
    """A step as a graph, and where its results will stand; None, with a warning, where this card or this torch cannot record it."""
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=self.graph_pool): result = self.compute(x, capacity)
    except RuntimeError as e:
        warnings.warn(f"a training step could not be recorded as a CUDA graph ({e}); it is started kernel by kernel.", stacklevel=2)
        return None
    return graph, result
