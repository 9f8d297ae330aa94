/* Casts that count what they change, and the numbers of tiers. What Python computes, to the bit:
 * h5traces/format/dtypes.py and h5traces/precision have the rules. */
#include "kernels.h"

#include <math.h>

#define PART 256

static size_t float_size(enum float_kind kind)
{
    return kind == FLOAT32 ? 4 : 2;
}

static uint32_t exponent_mask(enum float_kind kind)
{
    return kind == FLOAT16 ? 0x7C00 : kind == BFLOAT16 ? 0x7F80 : 0x7F800000;
}

/* Parts of 16 bits, which vectorise best, and of 32 bits. */
INLINE void count_special_body(const uint8_t *data, size_t count, int kind, size_t *special)
{
    uint32_t mask = exponent_mask((enum float_kind)kind);
    for (size_t start = 0; start < count; start += 4096) {
        size_t size = count - start < 4096 ? count - start : 4096;
        if (kind == FLOAT32) {
            uint32_t num_nan = 0, num_inf = 0;
            for (size_t i = 0; i < size; i++) {
                uint32_t rest = load32(data + 4 * (start + i)) & 0x7FFFFFFF;
                num_nan += rest > mask;
                num_inf += rest == mask;
            }
            special[0] += num_nan;
            special[1] += num_inf;
        } else {
            uint16_t num_nan = 0, num_inf = 0, narrow = (uint16_t)mask;
            for (size_t i = 0; i < size; i++) {
                uint16_t rest = load16(data + 2 * (start + i)) & 0x7FFF;
                num_nan = (uint16_t)(num_nan + (rest > narrow));
                num_inf = (uint16_t)(num_inf + (rest == narrow));
            }
            special[0] += num_nan;
            special[1] += num_inf;
        }
    }
}

/* NaN and infinite values. */
DISPATCH(, count_special, (const uint8_t *data, size_t count, int kind, size_t *special),
         (data, count, kind, special))

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Exact. */
INLINE void widen_part(const uint8_t *in, enum float_kind kind, float *out, size_t count)
{
    uint16_t part[PART];
    if (kind == FLOAT32) {
        memcpy(out, in, 4 * count);
        return;
    }
    memcpy(part, in, 2 * count);
    if (kind == FLOAT16) {
        floats_of_halves(part, out, count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)part[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

/* Ties to even, without NaN. */
INLINE void narrow_part(const float *in, enum float_kind kind, uint8_t *out, size_t count)
{
    uint16_t part[PART];
    if (kind == FLOAT32) {
        memcpy(out, in, 4 * count);
        return;
    }
    if (kind == FLOAT16)
        halves_of_floats(in, part, count);
    else
        for (size_t i = 0; i < count; i++) {
            uint32_t bits = bits_of(in[i]);
            part[i] = (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
        }
    memcpy(out, part, 2 * count);
}

/* Overflows, values that became zero, and values that became subnormal and so lost precision. */
INLINE void count_lost_body(const float *before, const float *after, const uint32_t *exponents,
                            size_t count, size_t *lost)
{
    uint32_t overflow = 0, to_zero = 0, to_subnormal = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t was = bits_of(before[i]) & 0x7FFFFFFF, is = bits_of(after[i]) & 0x7FFFFFFF;
        overflow += (is == 0x7F800000) & (was < 0x7F800000);
        to_zero += (is == 0) & (was != 0);
        to_subnormal += (exponents[i] == 0) & (is != 0) & (is != was);
    }
    lost[0] += overflow;
    lost[1] += to_zero;
    lost[2] += to_subnormal;
}

DISPATCH(, count_lost,
         (const float *before, const float *after, const uint32_t *exponents, size_t count,
          size_t *lost),
         (before, after, exponents, count, lost))

INLINE void count_differing_body(const uint8_t *one, const uint8_t *other, size_t count, size_t size,
                                 size_t *differing)
{
    uint32_t found = 0;
    if (size == 2)
        for (size_t i = 0; i < count; i++)
            found += load16(one + 2 * i) != load16(other + 2 * i);
    else
        for (size_t i = 0; i < count; i++)
            found += load32(one + 4 * i) != load32(other + 4 * i);
    *differing += found;
}

DISPATCH(, count_differing,
         (const uint8_t *one, const uint8_t *other, size_t count, size_t size, size_t *differing),
         (one, other, count, size, differing))

/* Values without NaN in another type. Overflows, to zero, to subnormal, and how many do not come
 * back bit for bit. */
void cast_counted(const uint8_t *in, enum float_kind from, uint8_t *out, enum float_kind to,
                  size_t count, size_t *counts)
{
    float before[PART], after[PART];
    uint8_t back[4 * PART];
    uint32_t exponents[PART], mask = exponent_mask(to);
    if (to == FLOAT32) {
        /* Exact. */
        for (size_t start = 0; start < count; start += PART) {
            size_t size = count - start < PART ? count - start : PART;
            widen_part(in + start * float_size(from), from, after, size);
            memcpy(out + 4 * start, after, 4 * size);
        }
        return;
    }
    for (size_t start = 0; start < count; start += PART) {
        size_t size = count - start < PART ? count - start : PART;
        const uint8_t *source = in + start * float_size(from);
        uint8_t *target = out + start * float_size(to);
        widen_part(source, from, before, size);
        narrow_part(before, to, target, size);
        widen_part(target, to, after, size);
        for (size_t i = 0; i < size; i++)
            exponents[i] = (float_size(to) == 2 ? load16(target + 2 * i) : load32(target + 4 * i)) & mask;
        count_lost(before, after, exponents, size, counts);
        narrow_part(after, from, back, size);
        count_differing(source, back, size, float_size(from), counts + 3);
    }
}

/* Adding this to a smaller number leaves its nearest whole number in the last bits. */
#define WHOLE 12582912.0f

/* Numbers of steps, and what they stand for. */
INLINE void steps_of_body(const float *source, const StepScale *scale, size_t channel, size_t count,
                          uint32_t *restrict numbers, float *restrict restored)
{
    const float *step = scale->step + channel, *inverse = scale->inverse + channel;
    const float *offset = scale->offset + channel;
    float most = scale->most_steps;
    for (size_t i = 0; i < count; i++) {
        float steps = (source[i] - offset[i]) * inverse[i];
        steps = steps < -most ? -most : steps;
        steps = steps > most ? most : steps;
        steps += WHOLE;
        numbers[i] = bits_of(steps);
        restored[i] = (steps - WHOLE) * step[i] + offset[i];
    }
}

DISPATCH(, steps_of,
         (const float *source, const StepScale *scale, size_t channel, size_t count,
          uint32_t *restrict numbers, float *restrict restored),
         (source, scale, channel, count, numbers, restored))

/* Where values, or what they are rounded to, may be farther from their sources than the limits. */
INLINE void far_from_body(const float *source, const float *restored, const float *rounded,
                          const float *limit, size_t count, uint8_t *restrict outside)
{
    for (size_t i = 0; i < count; i++) {
        float error = source[i] - restored[i], other = source[i] - rounded[i];
        error = error < 0 ? -error : error;
        other = other < 0 ? -other : other;
        outside[i] = !(error <= limit[i]) | !(other <= limit[i]);
    }
}

DISPATCH(, far_from,
         (const float *source, const float *restored, const float *rounded, const float *limit,
          size_t count, uint8_t *restrict outside),
         (source, restored, rounded, limit, count, outside))

INLINE void pack_body(const uint32_t *numbers, const uint8_t *outside, const StepScale *scale,
                      size_t count, size_t itemsize, uint8_t *restrict out, size_t *num_outside)
{
    uint32_t found = 0;
    for (size_t i = 0; i < count; i++)
        found += outside[i];
    if (itemsize == 1)
        for (size_t i = 0; i < count; i++)
            out[i] = (uint8_t)(numbers[i] * scale->spacing + scale->zero_point);
    else
        for (size_t i = 0; i < count; i++)
            memcpy(out + 2 * i, &(uint16_t){(uint16_t)(numbers[i] * scale->spacing + scale->zero_point)}, 2);
    *num_outside = found;
}

DISPATCH(, pack,
         (const uint32_t *numbers, const uint8_t *outside, const StepScale *scale, size_t count,
          size_t itemsize, uint8_t *restrict out, size_t *num_outside),
         (numbers, outside, scale, count, itemsize, out, num_outside))

/* Rows of `width` values as numbers of steps of one or two bytes; the flat indices of those that do
 * not come back within the bound, in float32 and in their own type, at most `most`. Their number, or
 * -1 if there are more. */
int64_t numbers_of_values(const uint8_t *in, enum float_kind from, size_t count,
                          const StepScale *scale, uint8_t *out, size_t itemsize, int64_t *beyond,
                          size_t most)
{
    float part[PART], restored[PART], rounded[PART];
    uint32_t numbers[PART];
    uint16_t halves[PART];
    uint8_t outside[PART];
    size_t channel = 0, num_beyond = 0;
    for (size_t done = 0; done < count;) {
        size_t size = scale->width - channel < PART ? scale->width - channel : PART, num_outside = 0;
        size = count - done < size ? count - done : size;
        widen_part(in + done * float_size(from), from, part, size);
        steps_of(part, scale, channel, size, numbers, restored);
        if (from == FLOAT16) {
            halves_of_floats(restored, halves, size);
            floats_of_halves(halves, rounded, size);
        }
        const float *read = from == FLOAT16 ? rounded : restored;
        far_from(part, restored, read, scale->limit + channel, size, outside);
        pack(numbers, outside, scale, size, itemsize, out + itemsize * done, &num_outside);
        for (size_t i = 0; num_outside; num_outside--, i++) {
            i = (size_t)((uint8_t *)memchr(outside + i, 1, size - i) - outside);
            double source = part[i], bound = scale->bound[channel + i];
            if (fabs(restored[i] - source) <= bound && fabs(read[i] - source) <= bound)
                continue;
            if (num_beyond == most)
                return -1;
            beyond[num_beyond++] = (int64_t)(done + i);
        }
        done += size;
        channel = channel + size == scale->width ? 0 : channel + size;
    }
    return (int64_t)num_beyond;
}

/* What a table of all 16-bit floats has for some of them, of one or two bytes, and the largest bits
 * of these. */
INLINE void levels_of_body(const uint8_t *in, size_t count, const uint8_t *table, size_t size,
                           uint8_t *restrict out, uint32_t *largest)
{
    uint16_t most = 0;
    for (size_t i = 0; i < count; i++) {
        uint16_t bits = load16(in + 2 * i);
        most = bits > most ? bits : most;
    }
    if (size == 1)
        for (size_t i = 0; i < count; i++)
            out[i] = table[load16(in + 2 * i)];
    else
        for (size_t i = 0; i < count; i++)
            memcpy(out + 2 * i, table + 2 * (size_t)load16(in + 2 * i), 2);
    *largest = most;
}

DISPATCH(, levels_of,
         (const uint8_t *in, size_t count, const uint8_t *table, size_t size, uint8_t *restrict out,
          uint32_t *largest),
         (in, count, table, size, out, largest))
