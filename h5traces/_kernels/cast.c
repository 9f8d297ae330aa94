/* Elements in other orders and types: HDF5's shuffle, floats of 16 bits, tiers. */
#include "kernels.h"

#if HAS_WIDE
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#endif

int kernels_wide = 0;

void kernels_init(int may_be_wide)
{
    (void)may_be_wide;
#if HAS_WIDE
    __builtin_cpu_init();
    /* F16C is older than AVX2, and compilers know no name for it. */
    kernels_wide = may_be_wide && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                   __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
#endif
}

/* Plane by plane, all first bytes of elements, then all second ones; what is left of the last,
 * incomplete element follows. */
INLINE void shuffle_body(const uint8_t *restrict raw, uint8_t *restrict out, size_t nbytes,
                         size_t itemsize)
{
    size_t count = nbytes / itemsize;
    if (itemsize == 2) {
        for (size_t i = 0; i < count; i++) {
            uint16_t element = load16(raw + 2 * i);
            out[i] = (uint8_t)element;
            out[count + i] = (uint8_t)(element >> 8);
        }
    } else if (itemsize == 4) {
        for (size_t i = 0; i < count; i++) {
            uint32_t element = load32(raw + 4 * i);
            for (int plane = 0; plane < 4; plane++)
                out[plane * count + i] = (uint8_t)(element >> 8 * plane);
        }
    } else if (itemsize == 1) {
        memcpy(out, raw, count);
    } else {
        for (size_t plane = 0; plane < itemsize; plane++)
            for (size_t i = 0; i < count; i++)
                out[plane * count + i] = raw[i * itemsize + plane];
    }
    memcpy(out + count * itemsize, raw + count * itemsize, nbytes - count * itemsize);
}

/* `count` elements from `first` on, of planes of `num_elements`. */
INLINE void unshuffle_body(const uint8_t *restrict planes, size_t num_elements, size_t itemsize,
                           size_t first, size_t count, uint8_t *restrict out)
{
    planes += first;
    if (itemsize == 2) {
        const uint8_t *low = planes, *high = planes + num_elements;
        for (size_t i = 0; i < count; i++) {
            uint16_t element = (uint16_t)(low[i] | high[i] << 8);
            memcpy(out + 2 * i, &element, sizeof element);
        }
    } else if (itemsize == 4) {
        const uint8_t *a = planes, *b = a + num_elements, *c = b + num_elements;
        const uint8_t *d = c + num_elements;
        for (size_t i = 0; i < count; i++) {
            uint32_t element = a[i] | (uint32_t)b[i] << 8 | (uint32_t)c[i] << 16 | (uint32_t)d[i] << 24;
            memcpy(out + 4 * i, &element, sizeof element);
        }
    } else if (itemsize == 1) {
        memcpy(out, planes, count);
    } else {
        /* Few elements at a time stay in the cache while all planes are gone through. */
        for (size_t start = 0; start < count; start += 256) {
            size_t stop = start + 256 < count ? start + 256 : count;
            for (size_t plane = 0; plane < itemsize; plane++)
                for (size_t i = start; i < stop; i++)
                    out[i * itemsize + plane] = planes[plane * num_elements + i];
        }
    }
}

DISPATCH(, shuffle, (const uint8_t *raw, uint8_t *out, size_t nbytes, size_t itemsize),
         (raw, out, nbytes, itemsize))
DISPATCH(, unshuffle,
         (const uint8_t *planes, size_t num_elements, size_t itemsize, size_t first, size_t count,
          uint8_t *out),
         (planes, num_elements, itemsize, first, count, out))

INLINE float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Ties to even; NaN keeps the upper bits of its payload and becomes quiet, as processors do it. */
INLINE uint16_t half_of_float(float value)
{
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000)
        return (uint16_t)(sign | 0x7E00 | (rest >> 13 & 0x1FF));
    if (rest >= 0x477FF000)
        return (uint16_t)(sign | 0x7C00);
    if (rest < 0x38800000)
        /* Adding 2^23 / 2^24 leaves no bits below those of a subnormal number. */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3F000000));
    rest += 0xFFF + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - 0x38000000) >> 13);
}

INLINE float float_of_half(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7FFF) << 13;
    if (rest >= 0x0F800000)
        /* A NaN becomes quiet, as processors do it. */
        return float_of_bits(sign | rest | 0x70000000 | (rest & 0x7FFFFF ? 0x400000 : 0));
    if (rest >= 0x00800000)
        return float_of_bits(sign | (rest + 0x38000000));
    return float_of_bits(sign | bits_of_float(float_of_bits(rest | 0x38800000) - 0x1p-14f));
}

/* Small blocks of numbers on their way. */
#define PART 256

static void halves_of_plain(const float *in, uint16_t *out, size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = half_of_float(in[i]);
}

static void floats_of_plain(const uint16_t *in, float *out, size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = float_of_half(in[i]);
}

#if HAS_WIDE
WIDE static size_t halves_of_fast(const float *in, uint16_t *out, size_t count)
{
    size_t i = 0;
    for (; kernels_wide && i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
    return i;
}

WIDE static size_t floats_of_fast(const uint16_t *in, float *out, size_t count)
{
    size_t i = 0;
    for (; kernels_wide && i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
    return i;
}
#elif defined(__aarch64__) && defined(__ARM_NEON)
static size_t halves_of_fast(const float *in, uint16_t *out, size_t count)
{
    size_t i = 0;
    for (; i + 4 <= count; i += 4)
        vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
    return i;
}

static size_t floats_of_fast(const uint16_t *in, float *out, size_t count)
{
    size_t i = 0;
    for (; i + 4 <= count; i += 4)
        vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + i))));
    return i;
}
#else
#define halves_of_fast(in, out, count) 0
#define floats_of_fast(in, out, count) 0
#endif

void halves_of_floats(const float *in, uint16_t *out, size_t count)
{
    size_t done = halves_of_fast(in, out, count);
    halves_of_plain(in + done, out + done, count - done);
}

void floats_of_halves(const uint16_t *in, float *out, size_t count)
{
    size_t done = floats_of_fast(in, out, count);
    floats_of_plain(in + done, out + done, count - done);
}

/* Numbers of steps of neighbouring channels, `count` of them at most PART. The order of operations
 * is that of `from_steps` in precision/channel_steps.py. */
INLINE void numbers_of_steps_body(const uint8_t *low, const uint8_t *high, size_t count,
                                  float zero_point, const float *factor, const float *offset,
                                  float *restrict out)
{
    if (high)
        for (size_t i = 0; i < count; i++)
            out[i] = ((float)(low[i] | high[i] << 8) - zero_point) * factor[i] + offset[i];
    else
        for (size_t i = 0; i < count; i++)
            out[i] = ((float)low[i] - zero_point) * factor[i] + offset[i];
}

DISPATCH(, numbers_of_steps,
         (const uint8_t *low, const uint8_t *high, size_t count, float zero_point,
          const float *factor, const float *offset, float *restrict out),
         (low, high, count, zero_point, factor, offset, out))

/* Steps of a chunk whose rows have `width` channels, from element `first` on. */
void restore_steps(const uint8_t *planes, size_t num_elements, size_t itemsize, size_t first,
                   size_t count, size_t width, float zero_point, const float *table, int as_half,
                   uint8_t *out)
{
    const uint8_t *low = planes + first, *high = itemsize == 2 ? low + num_elements : NULL;
    size_t channel = first % width;
    float part[PART];
    for (size_t done = 0; done < count;) {
        size_t size = width - channel < PART ? width - channel : PART;
        size = count - done < size ? count - done : size;
        float *numbers = as_half ? part : (float *)(void *)out + done;
        numbers_of_steps(low + done, high ? high + done : NULL, size, zero_point, table + channel,
                         table + width + channel, numbers);
        if (as_half)
            halves_of_floats(part, (uint16_t *)(void *)out + done, size);
        done += size;
        channel = channel + size == width ? 0 : channel + size;
    }
}

/* As `restore_steps`, of numbers in their own order, which begin with the first channel. */
void restore_interleaved(const uint8_t *numbers, size_t itemsize, size_t count, size_t width,
                         float zero_point, const float *table, int as_half, uint8_t *out)
{
    uint8_t planes[2 * PART];
    if (itemsize == 1) {
        restore_steps(numbers, count, 1, 0, count, width, zero_point, table, as_half, out);
        return;
    }
    for (size_t done = 0; done < count;) {
        size_t channel = done % width, size = width - channel < PART ? width - channel : PART;
        size = count - done < size ? count - done : size;
        shuffle(numbers + 2 * done, planes, 2 * size, 2);
        float part[PART], *values = as_half ? part : (float *)(void *)out + done;
        numbers_of_steps(planes, planes + size, size, zero_point, table + channel,
                         table + width + channel, values);
        if (as_half)
            halves_of_floats(part, (uint16_t *)(void *)out + done, size);
        done += size;
    }
}

/* Elements of a table of 256, of 2 or 4 bytes. */
void look_up(const uint8_t *rows, size_t count, const uint8_t *table, size_t size, uint8_t *out)
{
    if (size == 2)
        for (size_t i = 0; i < count; i++)
            memcpy(out + 2 * i, table + 2 * rows[i], 2);
    else
        for (size_t i = 0; i < count; i++)
            memcpy(out + 4 * i, table + 4 * rows[i], 4);
}

/* Planes of 16-bit floats as float32. */
void widen(const uint8_t *planes, size_t num_elements, size_t first, size_t count, int is_bfloat,
           uint8_t *out)
{
    uint16_t part[PART];
    for (size_t done = 0; done < count; done += PART) {
        size_t size = count - done < PART ? count - done : PART;
        float *numbers = (float *)(void *)out + done;
        unshuffle(planes, num_elements, 2, first + done, size, (uint8_t *)part);
        if (is_bfloat)
            for (size_t i = 0; i < size; i++)
                numbers[i] = float_of_bits((uint32_t)part[i] << 16);
        else
            floats_of_halves(part, numbers, size);
    }
}
