/* Fuzzes the kernels with zlib and, where it is installed, libdeflate as oracles. Built with
 * AddressSanitizer and UBSan by tools/fuzz_kernels.py. Every buffer has exactly the size that is
 * promised, so that a byte read or written beyond it ends the program.
 *
 * usage: fuzz_kernels SEED EXECUTIONS SECONDS */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels.h"

#define LARGEST 70000

/* --- oracles, loaded by name: no headers are needed --- */

typedef struct {
    const uint8_t *next_in;
    unsigned avail_in;
    unsigned long total_in;
    uint8_t *next_out;
    unsigned avail_out;
    unsigned long total_out;
    const char *msg;
    void *state, *(*zalloc)(void *, unsigned, unsigned);
    void (*zfree)(void *, void *);
    void *opaque;
    int data_type;
    unsigned long adler, reserved;
} Stream;

static const char *(*zlib_version)(void);
static int (*inflate_init)(Stream *, int, const char *, int);
static int (*zlib_inflate)(Stream *, int);
static int (*inflate_end)(Stream *);
static int (*deflate_init)(Stream *, int, int, int, int, int, const char *, int);
static int (*zlib_deflate)(Stream *, int);
static int (*deflate_end)(Stream *);
static unsigned long (*zlib_adler)(unsigned long, const uint8_t *, unsigned);
static void *(*libdeflate_new)(void);
static int (*libdeflate_inflate)(void *, const void *, size_t, void *, size_t, size_t *, size_t *);
static void *libdeflate;

static void *symbol_of(void *library, const char *name)
{
    void *found = library ? dlsym(library, name) : NULL;
    if (library && !found) {
        fprintf(stderr, "%s is missing\n", name);
        exit(2);
    }
    return found;
}

static void load_oracles(void)
{
    void *library = dlopen("libz.so.1", RTLD_NOW);
    if (!library) {
        fprintf(stderr, "libz.so.1 is missing\n");
        exit(2);
    }
    *(void **)&zlib_version = symbol_of(library, "zlibVersion");
    *(void **)&inflate_init = symbol_of(library, "inflateInit2_");
    *(void **)&zlib_inflate = symbol_of(library, "inflate");
    *(void **)&inflate_end = symbol_of(library, "inflateEnd");
    *(void **)&deflate_init = symbol_of(library, "deflateInit2_");
    *(void **)&zlib_deflate = symbol_of(library, "deflate");
    *(void **)&deflate_end = symbol_of(library, "deflateEnd");
    *(void **)&zlib_adler = symbol_of(library, "adler32");
    library = dlopen("libdeflate.so.0", RTLD_NOW);
    *(void **)&libdeflate_new = symbol_of(library, "libdeflate_alloc_decompressor");
    *(void **)&libdeflate_inflate = symbol_of(library, "libdeflate_deflate_decompress_ex");
    if (library)
        libdeflate = libdeflate_new();
}

/* --- inputs --- */

static uint64_t state;

static uint64_t any(void)
{
    state += 0x9E3779B97F4A7C15u;
    uint64_t x = (state ^ state >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

static size_t below(size_t limit)
{
    return limit ? any() % limit : 0;
}

static int one_in(size_t number)
{
    return !below(number);
}

static uint8_t *copy_of(const uint8_t *data, size_t nbytes)
{
    uint8_t *copy = malloc(nbytes ? nbytes : 1);
    memcpy(copy, data, nbytes);
    return copy;
}

/* Noise, few values, runs and repeats, in any mixture. */
static size_t any_data(uint8_t *out, size_t most)
{
    size_t nbytes = below(one_in(8) ? most : one_in(3) ? 4000 : 300) + 1, at = 0;
    while (at < nbytes) {
        size_t size = below(one_in(2) ? 40 : 9000) + 1;
        size = size < nbytes - at ? size : nbytes - at;
        unsigned kind = (unsigned)below(5), mask = (unsigned)below(256), value = (unsigned)any();
        size_t distance = at ? below(at) + 1 : 0;
        for (size_t i = 0; i < size; i++, at++) {
            if (kind == 0)
                out[at] = (uint8_t)any();
            else if (kind == 1)
                out[at] = (uint8_t)(any() & mask);
            else if (kind == 2)
                out[at] = (uint8_t)value;
            else if (kind == 3)
                out[at] = (uint8_t)((any() & 15) + (any() & 15) + (any() & 15));
            else
                out[at] = distance ? out[at - distance] : 0;
        }
    }
    return nbytes;
}

static uint8_t *bits_at;
static unsigned bits_used;

static void put_bits(unsigned value, unsigned count)
{
    for (; count; count--, value >>= 1, bits_used++) {
        if (bits_used % 8 == 0)
            bits_at[bits_used / 8] = 0;
        bits_at[bits_used / 8] |= (uint8_t)((value & 1) << bits_used % 8);
    }
}

/* Lengths of a complete code over some of the symbols, at times one that is none. */
static void any_lengths(uint8_t *lengths, unsigned num_symbols, unsigned most)
{
    uint8_t leaves[320] = {1, 1};
    unsigned count = 2, wanted = (unsigned)below(one_in(2) ? 12 : num_symbols) + 1;
    memset(lengths, 0, num_symbols);
    for (unsigned tries = 0; count < wanted && tries < 2000; tries++) {
        unsigned i = (unsigned)below(count);
        if (leaves[i] < most) {
            leaves[count++] = ++leaves[i];
        }
    }
    count = wanted < 2 ? wanted : count;
    count = count < num_symbols ? count : num_symbols;
    for (unsigned i = 0; i < count; i++) {
        unsigned symbol = (unsigned)below(num_symbols);
        while (lengths[symbol])
            symbol = (symbol + 1) % num_symbols;
        lengths[symbol] = leaves[i];
    }
    if (one_in(6))
        lengths[below(num_symbols)] = (uint8_t)below(most + 1);
}

static size_t any_stream(uint8_t *out)
{
    static const uint8_t ORDER[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    bits_at = out;
    bits_used = 0;
    for (int more = 1; more;) {
        more = one_in(3);
        unsigned type = (unsigned)below(one_in(20) ? 4 : 3);
        put_bits(!more, 1);
        put_bits(type, 2);
        if (type == 0) {
            unsigned size = (unsigned)below(50);
            put_bits(0, -bits_used % 8);
            put_bits(size, 16);
            put_bits(one_in(30) ? size : ~size & 0xFFFF, 16);
            for (; size; size--)
                put_bits((unsigned)any() & 255, 8);
            continue;
        }
        if (type == 2) {
            uint8_t lengths[320], shorts[19];
            unsigned num_main = 257 + (unsigned)below(one_in(9) ? 32 : 30);
            unsigned num_distances = 1 + (unsigned)below(one_in(9) ? 32 : 30);
            any_lengths(lengths, num_main, 15);
            any_lengths(lengths + num_main, num_distances, one_in(3) ? 15 : 5);
            if (!lengths[256] && !one_in(9))
                lengths[256] = 1 + (uint8_t)below(9);
            if (one_in(2))
                memset(shorts, 4, 16), memset(shorts + 16, 0, 3); /* every length as it is */
            else
                any_lengths(shorts, 19, 7);
            put_bits(num_main - 257, 5);
            put_bits(num_distances - 1, 5);
            put_bits(15, 4);
            for (unsigned i = 0; i < 19; i++)
                put_bits(shorts[ORDER[i]], 3);
            for (unsigned i = 0; i < num_main + num_distances; i++)
                for (unsigned bit = 4; bit--;)
                    put_bits(lengths[i] >> bit & 1, 1);
        }
        for (size_t i = below(one_in(4) ? 3000 : 100); i; i--)
            put_bits((unsigned)any() & 0xFFFF, 16);
    }
    size_t nbytes = (bits_used + 7) / 8;
    for (size_t i = below(4); i; i--)
        out[nbytes++] = (uint8_t)any();
    return nbytes;
}

/* A raw stream of zlib, in all its ways. */
static size_t zlib_stream(const uint8_t *data, size_t nbytes, uint8_t *out, size_t most)
{
    Stream stream = {.next_in = data, .avail_in = (unsigned)nbytes, .next_out = out,
                     .avail_out = (unsigned)most};
    deflate_init(&stream, (int)below(10), 8, -(int)(9 + below(7)), 1 + (int)below(9), (int)below(5),
                 zlib_version(), (int)sizeof stream);
    zlib_deflate(&stream, 4);
    deflate_end(&stream);
    return stream.total_out;
}

static size_t mutate(uint8_t *data, size_t nbytes, size_t most)
{
    for (size_t times = below(4) + 1; times && nbytes; times--) {
        size_t at = below(one_in(2) ? (nbytes < 60 ? nbytes : 60) : nbytes), size = below(9) + 1;
        switch (below(6)) {
        case 0:
            data[at] ^= (uint8_t)(1u << below(8));
            break;
        case 1:
            data[at] = (uint8_t)any();
            break;
        case 2:
            nbytes = at;
            break;
        case 3:
            size = size < nbytes - at ? size : nbytes - at;
            memmove(data + at, data + at + size, nbytes - at - size);
            nbytes -= size;
            break;
        case 4:
            size = size < most - nbytes ? size : most - nbytes;
            memmove(data + at + size, data + at, nbytes - at);
            nbytes += size;
            break;
        default:
            data[nbytes - 1 - below(nbytes < 8 ? nbytes : 8)] ^= (uint8_t)any();
        }
    }
    return nbytes;
}

/* --- checks --- */

static unsigned long long executions, accepted, others;
static uint8_t bodies[2][LARGEST + 4096], expected[1 << 17];

static void wrong(const char *what, const uint8_t *body, size_t nbytes)
{
    FILE *file = fopen("kernel-finding.bin", "wb");
    if (file) {
        fwrite(body, 1, nbytes, file);
        fclose(file);
    }
    fprintf(stderr, "%s: execution %llu, %zu bytes, in kernel-finding.bin\n", what, executions, nbytes);
    abort();
}

/* As a zlib stream, with a header and room for the checksum. */
static uint8_t *wrapped(const uint8_t *body, size_t nbytes)
{
    uint8_t *stream = malloc(nbytes + 6);
    stream[0] = 0x78;
    stream[1] = 0x01;
    memcpy(stream + 2, body, nbytes);
    memset(stream + 2 + nbytes, 0, 4);
    return stream;
}

static int is_full(const Inflater *self)
{
    return self->state == FINISHED && self->out == self->out_end;
}

static void check_stream(const uint8_t *body, size_t nbytes, const uint8_t *other, size_t other_nbytes)
{
    Stream stream = {.next_in = body, .avail_in = (unsigned)nbytes, .next_out = expected,
                     .avail_out = sizeof expected};
    inflate_init(&stream, -15, zlib_version(), (int)sizeof stream);
    int is_good = zlib_inflate(&stream, 4) == 1;
    size_t size = stream.total_out, end = stream.total_in;
    inflate_end(&stream);
    static Inflater one, two, others_in_turn[NUM_LANES - 1];
    Inflater *alone = &one, *second = &two;
    uint8_t *copy = wrapped(body, nbytes), *out = malloc(size ? size : 1);
    inflate_begin(&one, copy, nbytes + 6, out, size);
    inflate_some(&alone, 1);
    if (is_full(&one) != is_good)
        wrong(is_good ? "zlib accepts what the kernel rejects" : "zlib rejects what the kernel accepts",
              body, nbytes);
    if (is_good) {
        accepted++;
        if (memcmp(out, expected, size) || (one.at + 7) / 8 != end + 2)
            wrong("zlib has other bytes, or another end", body, nbytes);
        uint32_t sum = adler32(out, size);
        if (sum != zlib_adler(1, expected, (unsigned)size))
            wrong("zlib has another checksum", body, nbytes);
        for (int i = 0; i < 4; i++)
            copy[nbytes + 2 + (size_t)i] = (uint8_t)(sum >> (24 - 8 * i));
        if (inflate_is_whole(&one) != (end == nbytes))
            wrong("a stream is whole where its end is not, or the reverse", body, nbytes);
        if (size) {
            /* Too small by a byte. */
            uint8_t *less = malloc(size - 1 ? size - 1 : 1);
            inflate_begin(&two, copy, nbytes + 6, less, size - 1);
            inflate_some(&second, 1);
            if (is_full(&two))
                wrong("more bytes than there is room for", body, nbytes);
            free(less);
        }
    }
    if (libdeflate) {
        size_t used = 0, made = 0;
        uint8_t *result = malloc(size ? size : 1);
        int found = libdeflate_inflate(libdeflate, body, nbytes, result, size, &used, &made) == 0;
        found = found && made == size;
        if (found != is_good)
            others++;
        else if (found && (memcmp(result, expected, size) || used != end))
            wrong("libdeflate has other bytes, or another end", body, nbytes);
        free(result);
    }
    /* In turn with others, in any order. */
    uint8_t *beside = wrapped(other, other_nbytes), *room = malloc((NUM_LANES - 1) * LARGEST);
    uint8_t *again = malloc(size ? size : 1);
    Inflater *streams[NUM_LANES];
    int count = 2 + (int)below(NUM_LANES - 1), place = (int)below((uint64_t)count);
    inflate_begin(&two, copy, nbytes + 6, again, size);
    for (int i = 0, next = 0; i < count; i++) {
        streams[i] = i == place ? &two : others_in_turn + next;
        if (i != place) {
            inflate_begin(others_in_turn + next, beside, other_nbytes + 6, room + next * LARGEST, LARGEST);
            next++;
        }
    }
    inflate_some(streams, count);
    inflate_some(&second, 1);
    if (is_full(&two) != is_good || (is_good && memcmp(again, expected, size)))
        wrong("some in turn differ from one", body, nbytes);
    free(copy);
    free(out);
    free(beside);
    free(room);
    free(again);
}

static void check_encoder(const uint8_t *data, size_t nbytes)
{
    static const size_t ITEMSIZES[] = {1, 2, 4, 8, 3};
    size_t itemsize = one_in(9) ? below(40) + 1 : ITEMSIZES[below(5)], bound = encode_bound(nbytes, itemsize);
    uint8_t *raw = copy_of(data, nbytes), *out = malloc(bound), *planes = malloc(nbytes);
    Encoder *encoder = encoder_new();
    size_t size = encode_chunk(encoder, raw, nbytes, itemsize, out);
    shuffle(raw, planes, nbytes, itemsize);
    if (size) {
        Stream stream = {.next_in = out, .avail_in = (unsigned)size, .next_out = expected,
                         .avail_out = sizeof expected};
        inflate_init(&stream, 15, zlib_version(), (int)sizeof stream);
        int is_good = zlib_inflate(&stream, 4) == 1;
        inflate_end(&stream);
        if (!is_good || stream.total_in != size || stream.total_out != nbytes || memcmp(planes, expected, nbytes))
            wrong("zlib does not read what the kernel wrote", data, nbytes);
        if (size > nbytes + 16 + 5 * itemsize + 5 * (nbytes / 32768 + 1))
            wrong("a chunk is far larger than its bytes", data, nbytes);
    }
    encoder_free(encoder);
    if (nbytes >= LEAST_DIGESTED) {
        uint8_t whole[16], parts[16];
        size_t head_nbytes = below(LARGEST_HEAD < nbytes ? LARGEST_HEAD : nbytes);
        uint8_t *head = copy_of(raw, head_nbytes), *rest = copy_of(raw + head_nbytes, nbytes - head_nbytes);
        xxh3_128(raw, 0, raw, nbytes, whole);
        xxh3_128(head, head_nbytes, rest, nbytes - head_nbytes, parts);
        if (memcmp(whole, parts, sizeof whole) || lookup3(raw, nbytes) != lookup3(data, nbytes))
            wrong("a digest depends on where its head ends", data, nbytes);
        free(head);
        free(rest);
    }
    uint8_t *back = malloc(nbytes);
    size_t count = nbytes / itemsize;
    unshuffle(planes, count, itemsize, 0, count, back);
    if (memcmp(back, raw, count * itemsize))
        wrong("unshuffle does not undo shuffle", data, nbytes);
    free(back);
    free(raw);
    free(out);
    free(planes);
}

static int64_t any_number(int64_t honest)
{
    switch (below(12)) {
    case 0:
        return (int64_t)any();
    case 1:
        return -(int64_t)below(300);
    case 2:
        return (int64_t)below(5000);
    case 3:
        return INT64_MAX - (int64_t)below(3);
    default:
        return honest;
    }
}

/* A plan that says anything about honest chunks. */
static void check_plan(const uint8_t *data, size_t nbytes)
{
    enum { NUM_ROWS = 5 };
    size_t itemsize = (size_t)1 << below(3), size = nbytes / itemsize * itemsize, bound;
    if (!size || size > 20000)
        return;
    bound = encode_bound(size, itemsize);
    uint8_t *raw = copy_of(data, size), *stored = malloc(bound);
    Encoder *encoder = encoder_new();
    size_t stored_nbytes = encode_chunk(encoder, raw, size, itemsize, stored);
    encoder_free(encoder);
    uint8_t *source = copy_of(stored, stored_nbytes), done[NUM_ROWS] = {0};
    size_t count = size / itemsize, width = below(70) + 1, arena_nbytes = 4 * size * NUM_ROWS;
    size_t tables_nbytes = 1024 + 8 * width;
    uint8_t *arena = malloc(arena_nbytes), *tables = malloc(tables_nbytes);
    for (size_t i = 0; i < tables_nbytes; i++)
        tables[i] = (uint8_t)any();
    Row rows[NUM_ROWS];
    memset(rows, 0, sizeof rows);
    for (int i = 0; i < NUM_ROWS; i++) {
        Row *row = rows + i;
        row->offset = any_number(0);
        row->nbytes = any_number((int64_t)stored_nbytes);
        row->checksum = stored_nbytes < LEAST_HASHED ? 0 : xxh3_64(source, stored_nbytes);
        row->is_checked = (uint8_t)one_in(2);
        row->raw_nbytes = any_number((int64_t)size);
        row->first = any_number((int64_t)below(count));
        row->count = any_number((int64_t)(count - (size_t)row->first % count));
        row->target = any_number((int64_t)size * 4 * i);
        row->table = any_number(0);
        row->itemsize = one_in(9) ? (int32_t)any() : (int32_t)itemsize;
        row->width = one_in(9) ? (int32_t)any() : (int32_t)width;
        row->zero_point = (int32_t)any();
        row->codec = (uint8_t)(one_in(9) ? any() : 0);
        row->restoring = (uint8_t)below(one_in(9) ? 256 : NUM_RESTORINGS);
    }
    Plan plan = {.descriptor = -1, .source = source, .source_nbytes = stored_nbytes, .rows = rows,
                 .num_rows = NUM_ROWS, .arena = arena, .arena_nbytes = arena_nbytes, .tables = tables,
                 .tables_nbytes = tables_nbytes, .done = done};
    plan_run(&plan, 1);
    free(raw);
    free(stored);
    free(source);
    free(arena);
    free(tables);
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    state = strtoull(argv[1], NULL, 10);
    unsigned long long most = strtoull(argv[2], NULL, 10);
    time_t end = time(NULL) + strtol(argv[3], NULL, 10);
    static uint8_t data[LARGEST];
    size_t sizes[2] = {0, 0};
    /* Even seeds are for processors without AVX2. */
    kernels_init(state & 1);
    encode_init();
    load_oracles();
    for (; executions < most && (executions % 256 || time(NULL) < end); executions++) {
        unsigned now = executions & 1;
        uint8_t *body = bodies[now];
        if (one_in(2)) {
            sizes[now] = any_stream(body);
        } else {
            size_t nbytes = any_data(data, LARGEST - 5000);
            sizes[now] = zlib_stream(data, nbytes, body, LARGEST);
            if (one_in(8))
                check_encoder(data, nbytes);
            if (one_in(8))
                check_plan(data, nbytes);
            if (!one_in(5))
                sizes[now] = mutate(body, sizes[now], LARGEST);
        }
        uint8_t *exact = copy_of(body, sizes[now]);
        check_stream(exact, sizes[now], bodies[!now], sizes[!now]);
        free(exact);
    }
    printf("%llu executions, %llu streams accepted, libdeflate differs from zlib in %llu%s\n", executions,
           accepted, others, libdeflate ? "" : " (not installed)");
    return 0;
}
