/* Checksums: xxh3-64 of stored chunks, xxh3-128 of content, Adler-32 of zlib streams (RFC 1950), and
 * lookup3 of HDF5's headers. */
#include "kernels.h"

#if HAS_WIDE
#include <immintrin.h>
#endif

/* xxh3-64 without a seed: https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md */

static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87u
#define PRIME64_2 0xC2B2AE3D27D4EB4Fu
#define PRIME64_3 0x165667B19E3779F9u
#define PRIME64_4 0x85EBCA77C2B2AE63u
#define PRIME64_5 0x27D4EB2F165667C5u
#define PRIME_MX1 0x165667919E3779F9u

#define STRIPE 64
/* The secret moves on by eight bytes for each stripe. */
#define STRIPES_PER_BLOCK ((sizeof SECRET - STRIPE) / 8)
#define BLOCK (STRIPES_PER_BLOCK * STRIPE)

INLINE uint64_t swapped(uint64_t x)
{
    x = (x & 0x00FF00FF00FF00FFu) << 8 | (x >> 8 & 0x00FF00FF00FF00FFu);
    x = (x & 0x0000FFFF0000FFFFu) << 16 | (x >> 16 & 0x0000FFFF0000FFFFu);
    return x << 32 | x >> 32;
}

/* Both halves of the product of 128 bits, exclusive or. */
INLINE uint64_t folded(uint64_t a, uint64_t b)
{
#if defined(__SIZEOF_INT128__)
    __uint128_t product = (__uint128_t)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
#else
    uint64_t low = (uint64_t)(uint32_t)a * (uint32_t)b, high = (a >> 32) * (b >> 32);
    uint64_t cross = (low >> 32) + (uint64_t)(uint32_t)a * (b >> 32);
    uint64_t other = (uint32_t)cross + (a >> 32) * (uint32_t)b;
    return ((uint32_t)low | other << 32) ^ (high + (cross >> 32) + (other >> 32));
#endif
}

INLINE uint64_t secret(size_t at)
{
    return load64(SECRET + at);
}

INLINE uint64_t mixed(const uint8_t *data, size_t at)
{
    return folded(load64(data) ^ secret(at), load64(data + 8) ^ secret(at + 8));
}

INLINE uint64_t avalanche(uint64_t x)
{
    x = (x ^ x >> 37) * PRIME_MX1;
    return x ^ x >> 32;
}

static uint64_t xxh3_of_few(const uint8_t *data, size_t nbytes)
{
    uint64_t low = load64(data) ^ secret(24) ^ secret(32);
    uint64_t high = load64(data + nbytes - 8) ^ secret(40) ^ secret(48);
    return avalanche(nbytes + swapped(low) + high + folded(low, high));
}

static uint64_t xxh3_of_some(const uint8_t *data, size_t nbytes)
{
    uint64_t sum = nbytes * PRIME64_1;
    if (nbytes <= 128) {
        for (size_t i = (nbytes - 1) / 32 + 1; i-- > 0;) {
            sum += mixed(data + 16 * i, 32 * i);
            sum += mixed(data + nbytes - 16 * (i + 1), 32 * i + 16);
        }
        return avalanche(sum);
    }
    for (size_t i = 0; i < 8; i++)
        sum += mixed(data + 16 * i, 16 * i);
    sum = avalanche(sum);
    for (size_t i = 8; i < nbytes / 16; i++)
        sum += mixed(data + 16 * i, 16 * (i - 8) + 3);
    return avalanche(sum + mixed(data + nbytes - 16, 136 - 17));
}

static void accumulate_plain(uint64_t *sums, const uint8_t *data, size_t num_stripes, size_t at)
{
    for (; num_stripes--; data += STRIPE, at += 8) {
        for (size_t i = 0; i < 8; i++) {
            uint64_t value = load64(data + 8 * i), key = value ^ secret(at + 8 * i);
            sums[i ^ 1] += value;
            sums[i] += (key & 0xFFFFFFFFu) * (key >> 32);
        }
    }
}

#if HAS_WIDE
WIDE static void accumulate_wide(uint64_t *sums, const uint8_t *data, size_t num_stripes, size_t at)
{
    __m256i low = _mm256_loadu_si256((const __m256i *)sums);
    __m256i high = _mm256_loadu_si256((const __m256i *)sums + 1);
    for (; num_stripes--; data += STRIPE, at += 8) {
        const __m256i *keys = (const __m256i *)(SECRET + at), *values = (const __m256i *)data;
        for (int i = 0; i < 2; i++) {
            __m256i value = _mm256_loadu_si256(values + i);
            __m256i key = _mm256_xor_si256(value, _mm256_loadu_si256(keys + i));
            __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
            __m256i sum = _mm256_add_epi64(product, _mm256_shuffle_epi32(value, 0x4E));
            if (i)
                high = _mm256_add_epi64(high, sum);
            else
                low = _mm256_add_epi64(low, sum);
        }
    }
    _mm256_storeu_si256((__m256i *)sums, low);
    _mm256_storeu_si256((__m256i *)sums + 1, high);
}
#endif

static void accumulate(uint64_t *sums, const uint8_t *data, size_t num_stripes, size_t at)
{
#if HAS_WIDE
    if (kernels_wide) {
        accumulate_wide(sums, data, num_stripes, at);
        return;
    }
#endif
    accumulate_plain(sums, data, num_stripes, at);
}

/* Sums of data of more than 240 bytes, of which `head` has the first ones, before the last scramble. */
static void sums_of(const uint8_t *head, size_t head_nbytes, const uint8_t *data, size_t nbytes,
                    uint64_t *sums)
{
    static const uint64_t START[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                      PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    uint8_t joined[BLOCK];
    size_t all = head_nbytes + nbytes, num_blocks = (all - 1) / BLOCK;
    memcpy(sums, START, sizeof START);
    for (size_t block = 0; block <= num_blocks; block++) {
        size_t start = block * BLOCK, size = block < num_blocks ? BLOCK : all - start;
        const uint8_t *from = joined;
        if (start < head_nbytes) {
            memcpy(joined, head, head_nbytes);
            memcpy(joined + head_nbytes, data, size - head_nbytes);
        } else {
            from = data + (start - head_nbytes);
        }
        accumulate(sums, from, block < num_blocks ? STRIPES_PER_BLOCK : (size - 1) / STRIPE, 0);
        for (size_t i = 0; i < 8 && block < num_blocks; i++)
            sums[i] = (sums[i] ^ sums[i] >> 47 ^ secret(sizeof SECRET - STRIPE + 8 * i)) * PRIME32_1;
    }
    size_t before = nbytes < STRIPE ? STRIPE - nbytes : 0;
    memcpy(joined, head + head_nbytes - before, before);
    memcpy(joined + before, data + nbytes - (STRIPE - before), STRIPE - before);
    accumulate(sums, joined, 1, sizeof SECRET - STRIPE - 7);
}

static uint64_t merged(const uint64_t *sums, size_t at, uint64_t start)
{
    for (size_t i = 0; i < 4; i++)
        start += folded(sums[2 * i] ^ secret(at + 16 * i), sums[2 * i + 1] ^ secret(at + 8 + 16 * i));
    return avalanche(start);
}

uint64_t xxh3_64(const uint8_t *data, size_t nbytes)
{
    if (nbytes <= 16)
        return xxh3_of_few(data, nbytes);
    if (nbytes <= 240)
        return xxh3_of_some(data, nbytes);
    uint64_t sums[8];
    sums_of(data, 0, data, nbytes, sums);
    return merged(sums, 11, nbytes * PRIME64_1);
}

void xxh3_128(const uint8_t *head, size_t head_nbytes, const uint8_t *data, size_t nbytes,
              uint8_t *digest)
{
    uint64_t sums[8], all = head_nbytes + nbytes;
    sums_of(head, head_nbytes, data, nbytes, sums);
    store64(digest, swapped(merged(sums, sizeof SECRET - STRIPE - 11, ~(all * PRIME64_2))));
    store64(digest + 8, swapped(merged(sums, 11, all * PRIME64_1)));
}

/* Bob Jenkins, "lookup3.c" (2006), hashlittle: the checksum of HDF5's metadata. */
uint32_t lookup3(const uint8_t *data, size_t nbytes)
{
    static const int MIXES[6] = {4, 6, 8, 16, 19, 4}, ENDS[7] = {14, 11, 25, 16, 4, 14, 24};
    uint32_t x[3], words[3];
    x[0] = x[1] = x[2] = 0xDEADBEEF + (uint32_t)nbytes;
    if (!nbytes)
        return x[2];
    for (; nbytes; data += 12) {
        int is_last = nbytes <= 12;
        size_t size = is_last ? nbytes : 12;
        memset(words, 0, sizeof words);
        memcpy(words, data, size);
        nbytes -= size;
        for (int i = 0; i < 3; i++)
            x[i] += words[i];
        for (int i = 0; i < 6 && !is_last; i++) {
            uint32_t *a = x + i % 3, *b = x + (i + 1) % 3, *c = x + (i + 2) % 3;
            *a -= *c;
            *a ^= *c << MIXES[i] | *c >> (32 - MIXES[i]);
            *c += *b;
        }
    }
    for (int i = 0; i < 7; i++) {
        uint32_t *to = x + (i + 2) % 3, from = x[(i + 1) % 3];
        *to = (*to ^ from) - (from << ENDS[i] | from >> (32 - ENDS[i]));
    }
    return x[2];
}

#define ADLER_MODULUS 65521u
/* Sums of 32 bits hold this many bytes without overflow. */
#define ADLER_BLOCK 5536

static void adler_plain(const uint8_t *data, size_t nbytes, uint32_t *sums)
{
    for (size_t i = 0; i < nbytes; i++) {
        sums[0] += data[i];
        sums[1] += sums[0];
    }
}

#if HAS_WIDE
/* `nbytes` is a multiple of 32. The second sum counts the first byte `nbytes` times, the last once. */
WIDE static void adler_wide(const uint8_t *data, size_t nbytes, uint32_t *sums)
{
    const __m256i weights =
        _mm256_setr_epi8(32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14,
                         13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1);
    const __m256i ones = _mm256_set1_epi16(1), zero = _mm256_setzero_si256();
    __m256i first = zero, firsts = zero, second = zero;
    for (size_t i = 0; i < nbytes; i += 32) {
        __m256i values = _mm256_loadu_si256((const __m256i *)(data + i));
        __m256i weighted = _mm256_maddubs_epi16(values, weights);
        firsts = _mm256_add_epi32(firsts, first);
        first = _mm256_add_epi32(first, _mm256_sad_epu8(values, zero));
        second = _mm256_add_epi32(second, _mm256_madd_epi16(weighted, ones));
    }
    uint32_t parts[3][8];
    _mm256_storeu_si256((__m256i *)parts[0], first);
    _mm256_storeu_si256((__m256i *)parts[1], firsts);
    _mm256_storeu_si256((__m256i *)parts[2], second);
    sums[1] += sums[0] * (uint32_t)nbytes;
    for (int i = 0; i < 8; i++) {
        sums[0] += parts[0][i];
        sums[1] += 32 * parts[1][i] + parts[2][i];
    }
}
#endif

uint32_t adler32(const uint8_t *data, size_t nbytes)
{
    uint32_t sums[2] = {1, 0};
    while (nbytes) {
        size_t part = nbytes < ADLER_BLOCK ? nbytes : ADLER_BLOCK;
#if HAS_WIDE
        size_t whole = kernels_wide ? part / 32 * 32 : 0;
        if (whole)
            adler_wide(data, whole, sums);
        adler_plain(data + whole, part - whole, sums);
#else
        adler_plain(data, part, sums);
#endif
        sums[0] %= ADLER_MODULUS;
        sums[1] %= ADLER_MODULUS;
        data += part;
        nbytes -= part;
    }
    return sums[1] << 16 | sums[0];
}
