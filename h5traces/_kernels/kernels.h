/* What the kernels share. Every function here is pure C: no Python, no locks, no globals that change
 * after `kernels_init`. All sizes are in bytes unless a name says otherwise. */
#ifndef H5TRACES_KERNELS_H
#define H5TRACES_KERNELS_H

/* Counts changes of what Python calls; `REVISION` in format/native.py must be the same. */
#define KERNELS_REVISION 6

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the kernels are for little-endian machines; elsewhere Python does their work"
#endif

#define INLINE static inline __attribute__((always_inline))
#define LIKELY(x) __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

/* A body that is compiled twice: for every processor, and for x86 with AVX2, BMI2, LZCNT and F16C. NEON
 * belongs to every 64-bit ARM, so compilers use it there without being asked. */
#if defined(__x86_64__)
#define HAS_WIDE 1
#define WIDE __attribute__((target("avx2,bmi,bmi2,f16c,lzcnt")))
#else
#define HAS_WIDE 0
#define WIDE
#endif
extern int kernels_wide; /* 0 elsewhere */

#define DISPATCH(scope, name, parameters, arguments)   \
    static void name##_plain parameters                \
    {                                                  \
        name##_body arguments;                         \
    }                                                  \
    WIDE static void name##_wide parameters            \
    {                                                  \
        name##_body arguments;                         \
    }                                                  \
    scope void name parameters                         \
    {                                                  \
        if (kernels_wide)                              \
            name##_wide arguments;                     \
        else                                           \
            name##_plain arguments;                    \
    }

/* Without `may_be_wide`, what every processor can do is used. */
void kernels_init(int may_be_wide);

INLINE uint16_t load16(const uint8_t *from)
{
    uint16_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE uint32_t load32(const uint8_t *from)
{
    uint32_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE uint64_t load64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE void store64(uint8_t *to, uint64_t value)
{
    memcpy(to, &value, sizeof value);
}

/* Memory that waits for the next call: getting it, and the system's clearing of it, take as long as a
 * small chunk. What `spare_give` returns has found no place. */
#define NUM_SPARE 4
typedef void *Spare[NUM_SPARE];

INLINE void *spare_take(Spare spare)
{
    void *found = NULL;
    for (int i = 0; i < NUM_SPARE && !found; i++)
        found = __atomic_exchange_n(spare + i, NULL, __ATOMIC_ACQ_REL);
    return found;
}

INLINE void *spare_give(Spare spare, void *memory)
{
    for (int i = 0; i < NUM_SPARE && memory; i++)
        memory = __atomic_exchange_n(spare + i, memory, __ATOMIC_ACQ_REL);
    return memory;
}

/* hash.c */
/* Of at least `LEAST_HASHED` bytes; no zlib stream of a byte is shorter. */
uint64_t xxh3_64(const uint8_t *data, size_t nbytes);
#define LEAST_HASHED 9
/* 16 bytes, the first ones first, of `head` and `data`, which have more than 240 together and a
 * `head` of at most a few hundred. */
void xxh3_128(const uint8_t *head, size_t head_nbytes, const uint8_t *data, size_t nbytes,
              uint8_t *digest);
#define LEAST_DIGESTED 241
#define LARGEST_HEAD 512
uint32_t lookup3(const uint8_t *data, size_t nbytes);
uint32_t adler32(const uint8_t *data, size_t nbytes);

/* inflate.c */
/* Bits that follow the codes of lengths (RFC 1951, 3.2.5), in what order lengths of the codes for
 * lengths stand (3.2.7), and the lengths of the fixed codes (3.2.6). */
extern const uint8_t LENGTH_EXTRA[29], SHORT_ORDER[19];
void fixed_lengths(uint8_t main_lengths[288], uint8_t distance_lengths[32]);
INLINE unsigned distance_extra(unsigned symbol)
{
    return symbol < 2 ? 0 : symbol / 2 - 1;
}

#define MAIN_BITS 12
#define DISTANCE_BITS 9

/* Canonical Huffman codes, which decode what is too long for the tables (RFC 1951, 3.2.2). */
typedef struct {
    uint16_t counts[16];
    uint16_t symbols[288];
} Codes;

enum inflate_state { AT_HEADER, IN_CODES, FINISHED, FAILED };

/* A raw deflate stream (RFC 1951) on its way from `in` to `out`. */
typedef struct {
    const uint8_t *in;
    size_t in_nbytes;
    uint64_t at; /* bits that were taken */
    uint8_t *start, *out, *out_end;
    enum inflate_state state;
    int is_last;
    Codes main_codes, distance_codes;
    unsigned main_bits; /* of the table below */
    uint32_t entry;
    uint32_t main_table[1 << MAIN_BITS];
    uint32_t distance_table[1 << DISTANCE_BITS];
} Inflater;

/* Begin with a zlib stream (RFC 1950) of a chunk that holds `out_nbytes`. */
void inflate_begin(Inflater *self, const uint8_t *in, size_t nbytes, uint8_t *out, size_t out_nbytes);
#define NUM_LANES 4
/* Go on with up to NUM_LANES streams in turn until one of them ends or fails. */
void inflate_some(Inflater *const *streams, int count);
/* Whether the stream ended well: exactly full, its checksum fits, and nothing follows. */
int inflate_is_whole(const Inflater *self);

/* cast.c */
void shuffle(const uint8_t *raw, uint8_t *out, size_t nbytes, size_t itemsize);
void unshuffle(const uint8_t *planes, size_t num_elements, size_t itemsize, size_t first,
               size_t count, uint8_t *out);
void halves_of_floats(const float *in, uint16_t *out, size_t count);
void floats_of_halves(const uint16_t *in, float *out, size_t count);
void restore_steps(const uint8_t *planes, size_t num_elements, size_t itemsize, size_t first,
                   size_t count, size_t width, float zero_point, const float *table, int as_half,
                   uint8_t *out);
void restore_interleaved(const uint8_t *numbers, size_t itemsize, size_t count, size_t width,
                         float zero_point, const float *table, int as_half, uint8_t *out);
void look_up(const uint8_t *rows, size_t count, const uint8_t *table, size_t size, uint8_t *out);
void widen(const uint8_t *planes, size_t num_elements, size_t first, size_t count, int is_bfloat,
           uint8_t *out);

/* numbers.c */
enum float_kind { FLOAT16, BFLOAT16, FLOAT32, NUM_FLOAT_KINDS };

/* How values become numbers of steps: float32 of `width` channels, and numbers for all. Values that
 * are nearer than `limit` are surely within `bound`. */
typedef struct {
    const float *step, *inverse, *offset, *limit, *bound;
    size_t width;
    float most_steps;
    uint32_t spacing, zero_point;
} StepScale;

void count_special(const uint8_t *data, size_t count, int kind, size_t *special);
void cast_counted(const uint8_t *in, enum float_kind from, uint8_t *out, enum float_kind to,
                  size_t count, size_t *counts);
int64_t numbers_of_values(const uint8_t *in, enum float_kind from, size_t count,
                          const StepScale *scale, uint8_t *out, size_t itemsize, int64_t *beyond,
                          size_t most);
void levels_of(const uint8_t *in, size_t count, const uint8_t *table, size_t size,
               uint8_t *restrict out, uint32_t *largest);

/* encode.c */
typedef struct Encoder Encoder;
Encoder *encoder_new(void); /* NULL without memory */
void encode_init(void);
void encoder_free(Encoder *self);
size_t encode_bound(size_t nbytes, size_t itemsize);
/* A zlib stream of at least one byte shuffled, in `encode_bound` bytes of `out`; its size, or 0
 * where Python should encode. */
size_t encode_chunk(Encoder *self, const uint8_t *raw, size_t nbytes, size_t itemsize, uint8_t *out);

/* plan.c */
enum restoring {
    AS_STORED = 0,
    STEPS_TO_FLOAT16 = 1,
    STEPS_TO_FLOAT32 = 2,
    TABLE_OF_2_BYTES = 3,
    TABLE_OF_4_BYTES = 4,
    FLOAT16_TO_FLOAT32 = 5,
    BFLOAT16_TO_FLOAT32 = 6,
    NUM_RESTORINGS
};

/* One chunk of a plan: the fields of `PLAN` in h5traces/storage/kernels.py, in their order. */
typedef struct {
    int64_t offset, nbytes;
    uint64_t checksum;
    int64_t raw_nbytes, first, count, target, table;
    int32_t itemsize, width, zero_point;
    uint8_t codec, restoring, is_checked, padding;
} Row;

/* Larger chunks, which h5traces does not write, are left to Python. */
#define LARGEST_CHUNK ((int64_t)1 << 28)
#define LARGEST_ITEM 4096

typedef struct {
    int descriptor; /* or -1: `source` is given */
    const uint8_t *source;
    size_t source_nbytes;
    const Row *rows;
    size_t num_rows;
    uint8_t *arena;
    size_t arena_nbytes;
    const uint8_t *tables;
    size_t tables_nbytes;
    uint8_t *done; /* one byte for each row: 1 where it was restored */
    int keeps_arena; /* a chunk that fails must not have written anything */
} Plan;

void plan_run(const Plan *plan, int num_threads);

#endif
