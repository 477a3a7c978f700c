"""Triton kernel that chooses the next tokens from logits, by the rules of docs/sampling.md.

Nothing is sorted. Tokens are drawn in the order of (logit descending, id ascending), so a set of
the first tokens in that order is a threshold, of which all larger logits are in the set, and how
many of those equal to it are. Such a pair is called a cut: it has a `least` and a `room`. A token
is found alike: the logit at which the mass of larger ones passes a number, then one of its equals.

Thresholds are found from the top bit down over whole numbers in the order of the logits (images),
two bits a pass, by the count or mass of what is not below. A token's mass is exp(logit - largest
logit), float32; of one number the mass is the same wherever it is computed. Sums over tokens are
made in one order, whatever the threshold, so that they never fall as it does.

The file is long because what runs in one launch stands in one kernel.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-untyped-calls

import triton
import triton.language as tl

from plugins.projection.kernel import read_rows

# Two bits of a threshold are found per pass over the tokens.
_PASSES = tl.constexpr(16)
# Below exp of it a mass counts as 0: of 2^31 such tokens nothing would be seen beside the largest.
_LOWEST_EXPONENT = tl.constexpr(-80.0)


@triton.jit
def image_of(logit):
    """A uint32 in the order of float32 logits; both zeros have one, and no number has 0."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    # Set the sign bit of what is positive, flip all bits of what is negative.
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def logit_of(image):
    """The float32 that has this image."""
    bits = image.to(tl.int32, bitcast=True)
    return (bits ^ ((~bits >> 31) | -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def exp_of_difference(a, b):
    """exp(a - b) for a <= b, to about a unit of a float32's last place; 1 for a = b."""
    difference = a - b
    # What the subtraction has rounded off; it counts where many tokens share a logit.
    back = difference - a
    lost = (a - (difference - back)) - (b + back)
    counts = difference > _LOWEST_EXPONENT
    x = tl.where(counts, difference, 0.0)
    lost = tl.where(counts, lost, 0.0)
    # x = n·ln 2 + r, with ln 2 in two parts, the first so short that its products are exact.
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + (n * 2.1219444005469057e-4 + lost)
    series = r * (1.0 / 5040.0) + 1.0 / 720.0
    series = series * r + 1.0 / 120.0
    series = series * r + 1.0 / 24.0
    series = series * r + 1.0 / 6.0
    series = series * r + 0.5
    series = series * r + 1.0
    series = series * r + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(counts, series * power, 0.0)


@triton.jit
def mass_of(image, top, least_mass):
    """Mass of a token; 0 for the image 0, and where it is below least_mass."""
    mass = tl.where(image > 0, exp_of_difference(logit_of(image), logit_of(top)), 0.0)
    return tl.where(mass >= least_mass, mass, 0.0)


@triton.jit
def adjusted_logits(
    logits,
    bias,
    counts,
    stop_ids,
    token,
    stops,
    repetition,
    presence,
    frequency,
    count,
    BIAS: tl.constexpr,
    HISTORY: tl.constexpr,
):
    """Logits of tokens after bias, penalties and forbidden ids, -inf from `count` on.

    Products are rounded before they are subtracted, as on the host: an fma of 0 is not merged with
    what follows it.
    """
    inside = token < count
    x = tl.load(logits + token, mask=inside, other=float("-inf"))
    if BIAS:
        x += tl.load(bias + token, mask=inside, other=0.0)
    if HISTORY:
        times = tl.load(counts + token, mask=inside, other=0)
        penalized = tl.where(x > 0.0, tl.div_rn(x, repetition), tl.fma(x, repetition, 0.0))
        x = tl.where(times > 0, penalized, x)
        generated = times >> 1
        x = x - tl.fma(generated.to(tl.float32), frequency, 0.0)
        x = x - tl.where(generated > 0, presence, 0.0)
    for place in range(stops):
        x = tl.where(token == tl.load(stop_ids + place), float("-inf"), x)
    return x


@triton.jit
def largest_reaching(
    images,
    masses,
    count,
    target,
    least_mass,
    BY_COUNT: tl.constexpr,
    ABOVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest image for which tokens with no smaller one reach a target; 0 if there is none.

    BY_COUNT they reach it in number, else in mass; with ABOVE the mass must be larger. Masses below
    `least_mass` count as 0.

    images, masses: [count].
    """
    one = tl.full([1], 1, tl.uint32)
    found = tl.full([1], 0, tl.uint32)
    for step in range(_PASSES):
        bit = one << (30 - 2 * step)
        if BY_COUNT:
            reach_1 = tl.full([BLOCK], 0, tl.int32)
            reach_2 = tl.full([BLOCK], 0, tl.int32)
            reach_3 = tl.full([BLOCK], 0, tl.int32)
        else:
            reach_1 = tl.full([BLOCK], 0.0, tl.float32)
            reach_2 = tl.full([BLOCK], 0.0, tl.float32)
            reach_3 = tl.full([BLOCK], 0.0, tl.float32)
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < count
            image = tl.load(images + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
            if BY_COUNT:
                weight = inside.to(tl.int32)
                none = 0
            else:
                weight = tl.load(masses + place, mask=inside, other=0.0)
                weight = tl.where(weight >= least_mass, weight, 0.0)
                none = 0.0
            reach_1 += tl.where(image >= found + bit, weight, none)
            reach_2 += tl.where(image >= found + 2 * bit, weight, none)
            reach_3 += tl.where(image >= found + 3 * bit, weight, none)
        sum_1 = tl.sum(reach_1, 0)
        sum_2 = tl.sum(reach_2, 0)
        sum_3 = tl.sum(reach_3, 0)
        if ABOVE:
            digit = (sum_1 > target).to(tl.uint32)
            digit += (sum_2 > target).to(tl.uint32)
            digit += (sum_3 > target).to(tl.uint32)
        else:
            digit = (sum_1 >= target).to(tl.uint32)
            digit += (sum_2 >= target).to(tl.uint32)
            digit += (sum_3 >= target).to(tl.uint32)
        found += digit * bit
    return tl.max(found, 0)


@triton.jit
def around(images, masses, count, image, least_mass, BLOCK: tl.constexpr):
    """Mass and number of the tokens with a larger image, and the number of those with this one."""
    mass_above = tl.full([BLOCK], 0.0, tl.float32)
    above = tl.full([BLOCK], 0, tl.int32)
    equal = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        other = tl.load(images + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
        mass = tl.load(masses + place, mask=inside, other=0.0)
        mass = tl.where(mass >= least_mass, mass, 0.0)
        mass_above += tl.where(other > image, mass, 0.0)
        above += (other > image).to(tl.int32)
        equal += ((other == image) & inside).to(tl.int32)
    return tl.sum(mass_above, 0), tl.sum(above, 0), tl.sum(equal, 0)


@triton.jit
def token_at(images, image, rank, count, BLOCK: tl.constexpr):
    """The token with this image, above 0, that has `rank` lower ones with it."""
    token = tl.full([BLOCK], 0, tl.int32)
    passed = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        other = tl.load(images + place, mask=place < count, other=0).to(tl.uint32, bitcast=True)
        equal = (other == image).to(tl.int32)
        order = passed + tl.cumsum(equal, 0)
        token += tl.where((equal > 0) & (order == rank + 1), place, 0)
        passed += tl.sum(equal, 0)
    return tl.sum(token, 0)


@triton.jit
def draw(images, masses, top, total, top_k, top_p, min_p, uniform, count, BLOCK: tl.constexpr):
    """Image and rank among its equals of the token that a uniform number picks."""
    least = top * 0  # every token with a mass is kept
    room = 0
    kept = total
    if (top_k > 0) & (top_k < count):
        least = largest_reaching(images, masses, count, top_k, 0.0, True, False, BLOCK)
        mass_above, above, equal = around(images, masses, count, least, 0.0, BLOCK)
        room = top_k - above
        kept = mass_above + room.to(tl.float32) * mass_of(least, top, 0.0)
    if top_p < 1.0:
        target = top_p * kept
        reached = largest_reaching(images, masses, count, target, 0.0, False, False, BLOCK)
        reached = tl.maximum(reached, least)
        mass_above, above, equal = around(images, masses, count, reached, 0.0, BLOCK)
        each = mass_of(reached, top, 0.0)
        room = tl.where(reached == least, room, equal)
        needed = tl.ceil(tl.div_rn(target - mass_above, each))
        room = tl.minimum(tl.maximum(needed, 1.0), room.to(tl.float32)).to(tl.int32)
        least = reached
        kept = mass_above + room.to(tl.float32) * each
    if min_p > 0.0:
        mass_above, above, equal = around(images, masses, count, least, min_p, BLOCK)
        kept = mass_above + room.to(tl.float32) * mass_of(least, top, min_p)
    target = uniform * kept
    picked = largest_reaching(images, masses, count, target, min_p, False, True, BLOCK)
    picked = tl.maximum(picked, least)
    mass_above, above, equal = around(images, masses, count, picked, min_p, BLOCK)
    equal = tl.where(picked == least, room, equal)
    rank = tl.floor(tl.div_rn(target - mass_above, mass_of(picked, top, min_p)))
    rank = tl.maximum(tl.minimum(rank, (equal - 1).to(tl.float32)), 0.0).to(tl.int32)
    return picked, rank


@triton.jit
def choose_tokens(
    logits,
    bias,
    counts,
    stop_ids,
    parameters,
    uniforms,
    embedding,
    embedding_scales,
    images,
    masses,
    arrivals,
    tokens,
    next_x,
    positions,
    ring,
    step,
    last_slot,
    vocab_size,
    V: tl.constexpr,
    BIAS: tl.constexpr,
    HISTORY: tl.constexpr,
    STOPS: tl.constexpr,
    UNIFORMS: tl.constexpr,
    RING: tl.constexpr,
    RING_ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    EMBEDDING: tl.constexpr,
    EMBEDDING_GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_EMBEDDING: tl.constexpr,
):
    """The next token of each sequence, and the end of the step; a program per sequence.

    logits [B, V] float32. parameters [B, 8] float32: temperature, top_k, top_p, min_p, repetition,
    presence and frequency penalty, min_tokens. uniforms [UNIFORMS, RING_ROW] float32, of which row
    step mod UNIFORMS is used. BIAS says whether there is a bias, "shared" [V] or "rows" [B, V].
    With HISTORY, counts [B, V] int32: 1 for a token of the prompt, and 2 for each time that it was
    generated. stop_ids [STOPS] int32, -1 where there is none.

    Written: tokens [B], -1 where no token can be picked; with an EMBEDDING format, next_x
    [B, COLUMNS], the token's row of the table, the first row for -1. Row step mod RING of ring
    [RING, RING_ROW] gets the tokens, counts the 2, positions [B] grow by 1 up to last_slot, and the
    last program adds 1 to step [1] int32.

    images int32 and masses float32 [B, V] are scratch; arrivals [1] int32 is 0 before and after.
    vocab_size is V: were its loops' length known, the compiler would unroll them and spill.
    """
    row = tl.program_id(0)
    now = tl.load(step)
    position = tl.load(positions + row)
    uniform = tl.load(uniforms + now % UNIFORMS * RING_ROW + row)
    own = parameters + row * 8
    temperature = tl.load(own)
    top_k = tl.load(own + 1).to(tl.int32)
    top_p = tl.load(own + 2)
    min_p = tl.load(own + 3)
    repetition = tl.load(own + 4)
    presence = tl.load(own + 5)
    frequency = tl.load(own + 6)
    stops = tl.where(now.to(tl.float32) < tl.load(own + 7), STOPS, 0)
    divisor = tl.where(temperature > 0.0, temperature, 1.0)
    logits += row * V
    counts += row * V
    images += row * V
    masses += row * V
    if BIAS == "rows":
        bias += row * V

    highest = tl.full([BLOCK], 0, tl.uint32)
    broken = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, vocab_size, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = adjusted_logits(
            logits, bias, counts, stop_ids, token, stops, repetition, presence, frequency,
            vocab_size, BIAS != "none", HISTORY,
        )  # fmt: skip
        broken |= ((x != x) | (x == float("inf"))).to(tl.int32)
        x = tl.div_rn(x, divisor)
        image = tl.where(tl.abs(x) < float("inf"), image_of(x), 0)
        highest = tl.maximum(highest, image)
        tl.store(images + token, image.to(tl.int32, bitcast=True), mask=token < vocab_size)
    top = tl.max(highest, 0)
    is_broken = (tl.max(broken, 0) > 0) | (top == 0)
    tl.debug_barrier()  # tokens are read by other threads than have written them

    picked = top
    rank = 0
    if (temperature > 0.0) & (is_broken == 0):
        total = tl.full([BLOCK], 0.0, tl.float32)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            image = tl.load(images + token, mask=token < vocab_size, other=0).to(
                tl.uint32, bitcast=True
            )
            mass = mass_of(image, top, 0.0)
            total += mass
            tl.store(masses + token, mass, mask=token < vocab_size)
        tl.debug_barrier()
        picked, rank = draw(
            images, masses, top, tl.sum(total, 0), top_k, top_p, min_p, uniform, vocab_size, BLOCK
        )
    chosen = token_at(images, picked, rank, vocab_size, BLOCK)
    chosen = tl.where(is_broken, -1, chosen)

    kept = chosen.to(tokens.dtype.element_ty)
    tl.debug_barrier()  # every thread has read what one of them overwrites
    tl.store(tokens + row, kept)
    tl.store(ring + now % RING * RING_ROW + row, kept)
    tl.store(positions + row, tl.minimum(position + 1, last_slot))
    row_of_table = tl.maximum(chosen, 0)
    if HISTORY:
        seen = tl.load(counts + row_of_table)
        tl.debug_barrier()
        tl.store(counts + row_of_table, seen + 2, mask=chosen >= 0)
    if EMBEDDING != "none":
        table_row = row_of_table + tl.arange(0, 1)
        for start in range(0, COLUMNS, BLOCK_EMBEDDING):
            column = start + tl.arange(0, BLOCK_EMBEDDING)
            value = read_rows(
                embedding, embedding_scales, table_row, table_row >= 0, column, COLUMNS, EMBEDDING,
                EMBEDDING_GROUP,
            )  # fmt: skip
            target = next_x + (row + tl.arange(0, 1))[:, None] * COLUMNS + column[None, :]
            tl.store(target, value.to(next_x.dtype.element_ty), mask=(column < COLUMNS)[None, :])
    earlier = tl.atomic_add(arrivals, 1, sem="acq_rel")
    if earlier == tl.num_programs(0) - 1:
        tl.store(step, now + 1)
        tl.store(arrivals, 0)
