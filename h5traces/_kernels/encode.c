/* A chunk as one zlib stream, plane by plane: noise in stored blocks, other bytes with Huffman codes
 * that fit the plane, runs and repeats as copies. The plans are those of h5traces/storage/deflate.py,
 * where the reasons for its numbers stand; only the coding itself is another. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

#define NUM_MAIN 286
#define NUM_DISTANCES 30
#define END_OF_BLOCK 256
/* Codes of at most 12 bits decode with one look-up, and in tables for 10 faster by a third, since those
 * of four streams fit into the fastest cache; so they may take a little more. */
#define MOST_BITS 12
#define QUICK_BITS 10
#define WORTH_QUICK 1.0025
#define MOST_STORED 65535
/* Tokens of a block at most, fewer than a stored block has bytes, so that no fallback is larger than
 * storing at once; and of its parts, which are joined where that costs nothing. */
#define BLOCK_TOKENS 61440
#define PART_TOKENS 4096
#define MOST_PARTS (BLOCK_TOKENS / PART_TOKENS)
/* Bits that a block must save: making its table takes as long as decoding 5 kB. */
#define WORTH_A_BLOCK 200.0
#define WINDOW 32768
#define HASH_BITS 15
#define FEW_HASH_BITS 11
#define LONGEST_KEY 8
#define FEWEST_BITS 1.5f
/* A coding that wins by at least one per cent on TRIED bytes codes the whole plane; smaller planes
 * than TRIAL are searched better. */
#define TRIED 4096
#define TRIAL 8192
#define LEAST_GAIN 0.99
#define LONGEST_COPY 258
/* Literals from which on eight tables of counts are faster than two. */
#define LONG_STRETCH 2048
#define NICE_COPY 96
#define SMALL (24 << 10)
#define TINY 1024

/* Bytes as they are, then a copy of what stands `distance` + 1 before; none where `length` is 0. */
typedef struct {
    uint32_t num_literals;
    uint16_t length, distance;
} Sequence;

typedef struct {
    uint8_t *out;
    uint64_t bits;
    unsigned num_bits;
} Writer;

typedef struct {
    uint32_t main[NUM_MAIN], distances[NUM_DISTANCES];
} Counts;

/* Some sequences, which may become a block. */
typedef struct {
    Counts counts;
    size_t num_sequences, nbytes;
} Part;

/* Codes ready to be written: the bits at the top, their number at the bottom. */
typedef struct {
    uint8_t main_lengths[288], distance_lengths[32];
    uint64_t main[288], distances[32];
} CodeBook;

enum coding { LITERALS = 1, RUNS = 2, SEARCH = 4, ALL_CODINGS = 7 };

struct Encoder {
    Sequence sequences[BLOCK_TOKENS];
    Part parts[MOST_PARTS];
    uint32_t heads[1 << HASH_BITS], links[WINDOW];
    /* In use of HASH_BITS. */
    unsigned hash_bits;
    /* Of a byte that is coded by itself. */
    float literal_bits;
    /* Bytes of the shortest copy, and earlier strings that are looked at. */
    unsigned least, depth;
    /* Copies among very few values need a better search than this one. */
    int gives_up;
    /* Only the size counts, roughly. */
    int is_trial;
    uint8_t *shuffled, *other, *whole; /* one piece of memory */
    size_t capacity;
    uint8_t length_symbols[LONGEST_COPY + 1];
    uint8_t distance_symbols[512];
};

/* Logarithms of what parts of a block have at most. */
static float LOGS[2 * PART_TOKENS];

void encode_init(void)
{
    for (int i = 1; i < 2 * PART_TOKENS; i++)
        LOGS[i] = log2f((float)i);
}

INLINE double log2_of(uint32_t number)
{
    double more = 0;
    for (; number >= 2 * PART_TOKENS; number >>= 3)
        more += 3;
    return LOGS[number] + more;
}

/* --- bits --- */

INLINE void put(Writer *to, uint64_t bits, unsigned num_bits)
{
    to->bits |= bits << to->num_bits;
    to->num_bits += num_bits;
}

/* Leaves fewer than 8 bits. Writes 8 bytes. */
INLINE void flush(Writer *to)
{
    store64(to->out, to->bits);
    to->out += to->num_bits >> 3;
    to->bits >>= to->num_bits & 56;
    to->num_bits &= 7;
}

INLINE void put_code(Writer *to, uint64_t code)
{
    put(to, code >> 1 >> (63 - (code & 63)), code & 63);
}

/* Up to the next whole byte. */
static void align(Writer *to)
{
    to->num_bits = (to->num_bits + 7) & ~7u;
    flush(to);
}

/* RFC 1951, 3.2.4 */
static void put_stored(Writer *to, const uint8_t *data, size_t nbytes, int is_last)
{
    do {
        size_t size = nbytes < MOST_STORED ? nbytes : MOST_STORED;
        put(to, is_last && size == nbytes, 3);
        align(to);
        put(to, size | (size ^ 0xFFFF) << 16, 32);
        flush(to);
        memcpy(to->out, data, size);
        to->out += size;
        data += size;
        nbytes -= size;
    } while (nbytes);
}

static size_t stored_nbytes(size_t nbytes)
{
    return nbytes + 5 * (nbytes ? (nbytes + MOST_STORED - 1) / MOST_STORED : 1);
}

/* --- codes --- */

/* Sort keys with counts from bit 16 on, by one byte of the counts after the other,
 * which keeps the order of what is equal. */
static void sort_by_count(uint64_t *keys, int num_keys)
{
    uint64_t other[288], largest = 0;
    for (int i = 0; i < num_keys; i++)
        largest = keys[i] > largest ? keys[i] : largest;
    for (unsigned shift = 16; largest >> shift; shift += 8) {
        unsigned ends[257] = {0};
        for (int i = 0; i < num_keys; i++)
            ends[(keys[i] >> shift & 0xFF) + 1]++;
        for (unsigned value = 1; value < 256; value++)
            ends[value] += ends[value - 1];
        memcpy(other, keys, (size_t)num_keys * sizeof *keys);
        for (int i = 0; i < num_keys; i++)
            keys[ends[other[i] >> shift & 0xFF]++] = other[i];
    }
}

/* Lengths of a Huffman code, at most `most` bits, of `num_symbols`; at least two get one.
 * After Moffat and Katajainen, "In-place calculation of minimum-redundancy codes" (1995). */
static void code_lengths(const uint32_t *counts, unsigned num_symbols, unsigned most, uint8_t *lengths)
{
    uint64_t sorted[288];
    uint32_t work[288];
    int used = 0;
    memset(lengths, 0, num_symbols);
    for (unsigned symbol = 0; symbol < num_symbols; symbol++)
        if (counts[symbol])
            sorted[used++] = (uint64_t)counts[symbol] << 16 | symbol;
    if (used < 2) {
        unsigned only = used ? (unsigned)sorted[0] & 0xFFFF : 0;
        lengths[only] = lengths[only ? 0 : 1] = 1;
        return;
    }
    sort_by_count(sorted, used);
    for (int i = 0; i < used; i++)
        work[i] = (uint32_t)(sorted[i] >> 16);
    int root = 0, leaf = 2, next;
    work[0] += work[1];
    for (next = 1; next < used - 1; next++) {
        uint32_t sum = 0;
        for (int i = 0; i < 2; i++) {
            if (leaf >= used || (root < next && work[root] < work[leaf])) {
                sum += work[root];
                work[root++] = (uint32_t)next;
            } else {
                sum += work[leaf++];
            }
        }
        work[next] = sum;
    }
    work[used - 2] = 0;
    for (next = used - 3; next >= 0; next--)
        work[next] = work[work[next]] + 1;
    /* How many leaves every depth has. */
    uint32_t num_of[64] = {0};
    int available = 1, depth = 0, inner = used - 2;
    while (available > 0) {
        int num_inner = 0;
        for (; inner >= 0 && (int)work[inner] == depth; inner--)
            num_inner++;
        num_of[depth < 63 ? depth : 63] += (uint32_t)(available - num_inner);
        available = 2 * num_inner;
        depth++;
    }
    for (unsigned bits = most + 1; bits < 64; bits++) {
        num_of[most] += num_of[bits];
        num_of[bits] = 0;
    }
    uint32_t total = 0;
    for (unsigned bits = 1; bits <= most; bits++)
        total += num_of[bits] << (most - bits);
    for (; total > 1u << most; total--) {
        unsigned bits = most - 1;
        while (!num_of[bits])
            bits--;
        num_of[most]--;
        num_of[bits]--;
        num_of[bits + 1] += 2;
    }
    unsigned bits = most;
    for (int i = 0; i < used; i++) {
        while (!num_of[bits])
            bits--;
        num_of[bits]--;
        lengths[sorted[i] & 0xFFFF] = (uint8_t)bits;
    }
}

static uint64_t weighted(const uint32_t *counts, unsigned num_symbols, const uint8_t *lengths)
{
    uint64_t num_bits = 0;
    for (unsigned symbol = 0; symbol < num_symbols; symbol++)
        num_bits += (uint64_t)counts[symbol] * lengths[symbol];
    return num_bits;
}

/* Lengths of the main codes, short ones for bytes alone: what holds copies gains nothing. */
static void main_lengths_of(const uint32_t *counts, uint8_t *lengths)
{
    uint8_t quick[NUM_MAIN];
    code_lengths(counts, NUM_MAIN, MOST_BITS, lengths);
    for (unsigned symbol = END_OF_BLOCK + 1; symbol < NUM_MAIN; symbol++)
        if (counts[symbol])
            return;
    code_lengths(counts, NUM_MAIN, QUICK_BITS, quick);
    double most = WORTH_QUICK * (double)weighted(counts, NUM_MAIN, lengths);
    if ((double)weighted(counts, NUM_MAIN, quick) <= most)
        memcpy(lengths, quick, sizeof quick);
}

/* RFC 1951, 3.2.2, with the bits in the order they are written in. */
static void codes_of(const uint8_t *lengths, unsigned num_symbols, uint64_t *codes)
{
    uint32_t num_of[16] = {0}, next[16] = {0}, code = 0;
    for (unsigned symbol = 0; symbol < num_symbols; symbol++)
        num_of[lengths[symbol]]++;
    num_of[0] = 0;
    for (unsigned bits = 1; bits < 16; bits++)
        next[bits] = code = (code + num_of[bits - 1]) << 1;
    for (unsigned symbol = 0; symbol < num_symbols; symbol++) {
        unsigned length = lengths[symbol];
        uint32_t straight = length ? next[length]++ : 0, reversed = 0;
        for (unsigned i = 0; i < length; i++)
            reversed |= (straight >> i & 1) << (length - 1 - i);
        codes[symbol] = (uint64_t)reversed << 1 << (63 - length) | length;
    }
}

/* Lengths of codes as RFC 1951, 3.2.7 writes them: a symbol each, and what it repeats above it. */
typedef struct {
    uint16_t items[320];
    unsigned num_items, num_main, num_distances, num_short;
    uint8_t short_lengths[19];
    uint64_t short_codes[19];
    size_t num_bits;
} Header;

static const uint8_t SHORT_EXTRA[19] = {[16] = 2, [17] = 3, [18] = 7};

static void make_header(const CodeBook *book, Header *header)
{
    uint8_t lengths[320];
    uint32_t counts[19] = {0};
    memset(header, 0, sizeof *header);
    header->num_main = NUM_MAIN;
    while (header->num_main > 257 && !book->main_lengths[header->num_main - 1])
        header->num_main--;
    header->num_distances = NUM_DISTANCES;
    while (header->num_distances > 1 && !book->distance_lengths[header->num_distances - 1])
        header->num_distances--;
    unsigned num_all = header->num_main + header->num_distances;
    memcpy(lengths, book->main_lengths, header->num_main);
    memcpy(lengths + header->num_main, book->distance_lengths, header->num_distances);
    for (unsigned i = 0; i < num_all;) {
        unsigned run = 1, symbol = lengths[i], extra = 0;
        while (i + run < num_all && lengths[i + run] == symbol)
            run++;
        if (!symbol && run >= 3) {
            run = run < 138 ? run : 138;
            symbol = run < 11 ? 17 : 18;
            extra = run - (run < 11 ? 3 : 11);
        } else if (i && symbol == lengths[i - 1] && run >= 3) {
            run = run < 6 ? run : 6;
            symbol = 16;
            extra = run - 3;
        } else {
            run = 1;
        }
        header->items[header->num_items++] = (uint16_t)(symbol | extra << 8);
        counts[symbol]++;
        i += run;
    }
    code_lengths(counts, 19, 7, header->short_lengths);
    codes_of(header->short_lengths, 19, header->short_codes);
    header->num_short = 19;
    while (header->num_short > 4 && !header->short_lengths[SHORT_ORDER[header->num_short - 1]])
        header->num_short--;
    header->num_bits = 14 + 3 * header->num_short;
    for (unsigned symbol = 0; symbol < 19; symbol++)
        header->num_bits += counts[symbol] * (header->short_lengths[symbol] + SHORT_EXTRA[symbol]);
}

static void put_header(Writer *to, const Header *header)
{
    put(to, (header->num_main - 257) | (header->num_distances - 1) << 5 | (header->num_short - 4) << 10,
        14);
    for (unsigned i = 0; i < header->num_short; i++) {
        flush(to);
        put(to, header->short_lengths[SHORT_ORDER[i]], 3);
    }
    for (unsigned i = 0; i < header->num_items; i++) {
        unsigned symbol = header->items[i] & 0xFF;
        flush(to);
        put_code(to, header->short_codes[symbol]);
        put(to, header->items[i] >> 8, SHORT_EXTRA[symbol]);
    }
    flush(to);
}

static size_t coded_bits(const Counts *counts, const CodeBook *book)
{
    size_t num_bits = 0;
    for (unsigned i = 0; i < NUM_MAIN; i++)
        num_bits += (size_t)counts->main[i] *
                    (book->main_lengths[i] + (i > END_OF_BLOCK ? LENGTH_EXTRA[i - 257] : 0u));
    for (unsigned i = 0; i < NUM_DISTANCES; i++)
        num_bits += (size_t)counts->distances[i] * (book->distance_lengths[i] + distance_extra(i));
    return num_bits;
}

/* --- sequences --- */

static unsigned distance_symbol(const Encoder *self, unsigned distance)
{
    return distance <= 256 ? self->distance_symbols[distance - 1]
                           : self->distance_symbols[256 + ((distance - 1) >> 7)];
}

static void make_symbols(Encoder *self)
{
    unsigned length = 3, distance = 0;
    for (unsigned symbol = 0; symbol < 28; symbol++)
        for (unsigned i = 0; i < 1u << LENGTH_EXTRA[symbol] && length < LONGEST_COPY; i++)
            self->length_symbols[length++] = (uint8_t)symbol;
    self->length_symbols[LONGEST_COPY] = 28;
    for (unsigned symbol = 0; symbol < NUM_DISTANCES; symbol++)
        for (unsigned i = 0; i < 1u << distance_extra(symbol); i++, distance++) {
            if (distance < 256)
                self->distance_symbols[distance] = (uint8_t)symbol;
            else
                self->distance_symbols[256 + (distance >> 7)] = (uint8_t)symbol;
        }
}

static void count_bytes(const uint8_t *data, size_t nbytes, uint32_t *counts)
{
    /* Neighbours are often equal, and adding to the same place waits for the addition before. */
    uint32_t more[8][256];
    memset(more, 0, sizeof more);
    size_t i = 0;
    for (; i + 8 <= nbytes; i += 8) {
        uint64_t eight = load64(data + i);
        for (int j = 0; j < 8; j++)
            more[j][eight >> 8 * j & 0xFF]++;
    }
    for (; i < nbytes; i++)
        counts[data[i]]++;
    for (unsigned value = 0; value < 256; value++)
        for (int j = 0; j < 8; j++)
            counts[value] += more[j][value];
}

static void count_part(const Encoder *self, const uint8_t *data, const Sequence *sequences, Part *part)
{
    uint32_t more[256] = {0}, *counts = part->counts.main;
    for (size_t i = 0; i < part->num_sequences; i++) {
        Sequence each = sequences[i];
        if (each.num_literals >= LONG_STRETCH) {
            count_bytes(data, each.num_literals, counts);
        } else {
            uint32_t at = 0;
            for (; at + 2 <= each.num_literals; at += 2) {
                counts[data[at]]++;
                more[data[at + 1]]++;
            }
            if (at < each.num_literals)
                counts[data[at]]++;
        }
        data += each.num_literals + each.length;
        if (each.length) {
            counts[257 + self->length_symbols[each.length]]++;
            part->counts.distances[distance_symbol(self, each.distance + 1u)]++;
        }
    }
    for (unsigned value = 0; value < 256; value++)
        counts[value] += more[value];
}

/* How many bytes from `at` on equal those at `before`, at most `most`. */
INLINE size_t equal_bytes(const uint8_t *at, const uint8_t *before, size_t most)
{
    size_t length = 0;
    while (length + 8 <= most && load64(at + length) == load64(before + length))
        length += 8;
    while (length < most && at[length] == before[length])
        length++;
    return length;
}

/* Where the next three bytes begin that equal the one before them; `end` if there are none. */
static const uint8_t *next_run(const uint8_t *at, const uint8_t *end)
{
    const uint64_t ones = 0x0101010101010101u, last_bits = 0x0000808080808080u;
    for (; end - at >= 8; at += 6) {
        /* A byte is zero where it equals the one before, and after the second line the next two, too. */
        uint64_t differs = load64(at) ^ load64(at - 1);
        differs |= differs >> 8 | differs >> 16;
        uint64_t zeros = (differs - ones) & ~differs & last_bits;
        if (zeros)
            return at + (__builtin_ctzll(zeros) >> 3);
    }
    for (; end - at >= 3; at++)
        if (at[-1] == at[0] && at[0] == at[1] && at[1] == at[2])
            return at;
    return end;
}

/* Each of these makes sequences of bytes from `*at` on, of `most` bytes and copies at most, and
 * returns their number. `start` is where the plane begins. */
static size_t take_literals(Sequence *to, const uint8_t **at, const uint8_t *end, size_t most)
{
    size_t size = (size_t)(end - *at) < most ? (size_t)(end - *at) : most;
    *to = (Sequence){(uint32_t)size, 0, 0};
    *at += size;
    return 1;
}

static size_t take_runs(Sequence *to, const uint8_t *start, const uint8_t **at, const uint8_t *end,
                        size_t most)
{
    size_t count = 0;
    const uint8_t *in = *at;
    while (in < end && most) {
        const uint8_t *run = next_run(in + (in == start), end);
        size_t num_literals = (size_t)(run - in), length = 0;
        if (num_literals >= most) {
            num_literals = most;
        } else if (run < end) {
            length = (size_t)(end - run) < LONGEST_COPY ? (size_t)(end - run) : LONGEST_COPY;
            length = equal_bytes(run, run - 1, length);
        }
        to[count++] = (Sequence){(uint32_t)num_literals, (uint16_t)length, 0};
        in += num_literals + length;
        most -= num_literals + (length != 0);
    }
    *at = in;
    return count;
}

/* Of as many bytes as the shortest copy has. */
INLINE uint32_t hash_of(const Encoder *self, const uint8_t *at)
{
    uint64_t key = load64(at) << (64 - 8 * self->least);
    return (uint32_t)(key * 0x9E3779B185EBCA87u >> (64 - self->hash_bits));
}

/* Positions are counted from `start`, plus one, so that zero means none. */
INLINE void remember(Encoder *self, const uint8_t *start, const uint8_t *at)
{
    uint32_t hash = hash_of(self, at), position = (uint32_t)(at - start) + 1;
    self->links[position % WINDOW] = self->heads[hash];
    self->heads[hash] = position;
}

/* Whether a copy takes fewer bits than its bytes would, as far as one can say before. */
INLINE int is_worth(const Encoder *self, size_t length, uint32_t distance)
{
    if (length >= 32)
        return 1;
    unsigned distance_bits = 0;
    while (distance >> distance_bits)
        distance_bits++;
    float fixed_bits = self->literal_bits < 3 ? 2 * self->literal_bits : 6;
    return (float)length * self->literal_bits >= fixed_bits + (float)distance_bits;
}

/* The longest earlier string; its length, 0 for none. */
static size_t longest(const Encoder *self, const uint8_t *start, const uint8_t *at, const uint8_t *end,
                      uint32_t *distance)
{
    unsigned depth = self->depth;
    size_t most = (size_t)(end - at) < LONGEST_COPY ? (size_t)(end - at) : LONGEST_COPY;
    size_t best = self->least - 1;
    uint32_t here = (uint32_t)(at - start) + 1, position = self->heads[hash_of(self, at)];
    while (position && position < here && here - position <= WINDOW && depth--) {
        const uint8_t *before = start + position - 1;
        if (before[best] == at[best]) {
            size_t length = equal_bytes(at, before, most);
            if (length > best && is_worth(self, length, here - position)) {
                best = length;
                *distance = here - position;
                if (best >= NICE_COPY || best == most)
                    break;
            }
        }
        uint32_t next = self->links[position % WINDOW];
        if (next >= position)
            break;
        position = next;
    }
    return best >= self->least ? best : 0;
}

/* Copies of all that was seen before; a copy waits for a longer one that begins at the next byte. */
static size_t take_copies(Encoder *self, Sequence *to, const uint8_t *start, const uint8_t **where,
                          const uint8_t *end, size_t most)
{
    size_t count = 0;
    const uint8_t *at = *where, *literals = at;
    for (size_t num_tokens = 0; at < end && num_tokens < most; num_tokens++) {
        uint32_t distance = 0, next_distance = 0;
        size_t length = 0;
        if (end - at > LONGEST_KEY) {
            length = longest(self, start, at, end, &distance);
            remember(self, start, at);
        }
        while (length && length < NICE_COPY && end - at > LONGEST_KEY + 1 && num_tokens + 1 < most) {
            size_t next = longest(self, start, at + 1, end, &next_distance);
            if (next <= length)
                break;
            num_tokens++;
            remember(self, start, ++at);
            length = next;
            distance = next_distance;
        }
        if (!length) {
            at++;
            continue;
        }
        to[count++] = (Sequence){(uint32_t)(at - literals), (uint16_t)length, (uint16_t)(distance - 1)};
        for (const uint8_t *stop = at++ + length; at < stop; at++)
            if (end - at > LONGEST_KEY)
                remember(self, start, at);
        literals = at;
    }
    if (at > literals)
        to[count++] = (Sequence){(uint32_t)(at - literals), 0, 0};
    *where = at;
    return count;
}

/* New bits push those before down, so that a code shifts, is added and counts as it is; what is below
 * the bits is never written. Two and two, so that only the last shift waits for the bytes before. */
INLINE void put_sequences_body(const Encoder *self, Writer *to, const Sequence *sequences,
                               size_t num_sequences, const uint8_t *data, const CodeBook *book)
{
    Writer w = *to;
    const uint64_t *codes = book->main;
    for (size_t i = 0; i < num_sequences; i++) {
        Sequence each = sequences[i];
        const uint8_t *stop = data + each.num_literals;
        uint64_t bits = w.bits << 1 << (63 - w.num_bits), num_bits = w.num_bits;
        for (; stop - data >= 4; data += 4) {
            uint64_t one = codes[data[0]], two = codes[data[1]];
            uint64_t three = codes[data[2]], four = codes[data[3]];
            uint64_t last = three + four, all = one + two + last;
            uint64_t first_two = one >> (two & 63) | two, last_two = three >> (four & 63) | four;
            bits = bits >> (all & 63) | first_two >> (last & 63) | last_two;
            num_bits = (num_bits + all) & 0xFF;
            store64(w.out, bits >> (64 - num_bits));
            w.out += num_bits >> 3;
            num_bits &= 7;
        }
        w.bits = bits >> 1 >> (63 - num_bits);
        w.num_bits = (unsigned)num_bits;
        for (; data < stop; data++)
            put_code(&w, codes[*data]);
        flush(&w);
        if (!each.length)
            continue;
        data += each.length;
        unsigned symbol = self->length_symbols[each.length];
        put_code(&w, codes[257 + symbol]);
        put(&w, (each.length - 3u) & ((1u << LENGTH_EXTRA[symbol]) - 1), LENGTH_EXTRA[symbol]);
        unsigned place = distance_symbol(self, each.distance + 1u), extra = distance_extra(place);
        put_code(&w, book->distances[place]);
        put(&w, each.distance & ((1u << extra) - 1), extra);
        flush(&w);
    }
    *to = w;
}

DISPATCH(static, put_sequences,
         (const Encoder *self, Writer *to, const Sequence *sequences, size_t num_sequences,
          const uint8_t *data, const CodeBook *book),
         (self, to, sequences, num_sequences, data, book))

/* One block; stored where that is smaller. */
static void put_block(const Encoder *self, Writer *to, const Sequence *sequences, const uint8_t *data,
                      Part *part, int is_last)
{
    Counts *counts = &part->counts;
    CodeBook book, fixed;
    Header header;
    counts->main[END_OF_BLOCK] = 1;
    memset(&book, 0, sizeof book);
    main_lengths_of(counts->main, book.main_lengths);
    code_lengths(counts->distances, NUM_DISTANCES, MOST_BITS, book.distance_lengths);
    make_header(&book, &header);
    fixed_lengths(fixed.main_lengths, fixed.distance_lengths);
    size_t dynamic_bits = header.num_bits + coded_bits(counts, &book);
    size_t fixed_bits = coded_bits(counts, &fixed);
    int is_fixed = fixed_bits <= dynamic_bits;
    if ((is_fixed ? fixed_bits : dynamic_bits) + 3 >= 8 * stored_nbytes(part->nbytes)) {
        put_stored(to, data, part->nbytes, is_last);
        return;
    }
    const CodeBook *chosen = is_fixed ? &fixed : &book;
    codes_of(chosen->main_lengths, is_fixed ? 288 : NUM_MAIN, ((CodeBook *)chosen)->main);
    codes_of(chosen->distance_lengths, NUM_DISTANCES, ((CodeBook *)chosen)->distances);
    put(to, (unsigned)is_last | (is_fixed ? 1u : 2u) << 1, 3);
    flush(to);
    if (!is_fixed)
        put_header(to, &header);
    put_sequences(self, to, sequences, part->num_sequences, data, chosen);
    put_code(to, chosen->main[END_OF_BLOCK]);
    flush(to);
}

/* Bits of the best codes without their tables, and a guess of those. */
static double estimated_bits(const Counts *counts)
{
    double total = 0, num_bits = 0, used = 0;
    for (unsigned i = 0; i < NUM_MAIN; i++) {
        if (!counts->main[i])
            continue;
        total += counts->main[i];
        num_bits -= counts->main[i] * log2_of(counts->main[i]);
        used++;
    }
    for (unsigned i = 0; i < NUM_DISTANCES; i++)
        used += counts->distances[i] != 0;
    return num_bits + total * log2_of((uint32_t)total) + 4 * used + 60;
}

static void add_counts(Counts *to, const Counts *other)
{
    for (unsigned i = 0; i < NUM_MAIN; i++)
        to->main[i] += other->main[i];
    for (unsigned i = 0; i < NUM_DISTANCES; i++)
        to->distances[i] += other->distances[i];
}

/* Parts as blocks, joined where they do not differ much in what is frequent. */
static void put_parts(const Encoder *self, Writer *to, const uint8_t *data, Part *parts, size_t num_parts,
                      int is_last)
{
    const Sequence *sequences = self->sequences;
    for (size_t i = 0, next; i < num_parts; i = next) {
        Part *part = parts + i;
        double bits = num_parts > 1 ? estimated_bits(&part->counts) : 0;
        for (next = i + 1; next < num_parts; next++) {
            Counts both = part->counts;
            add_counts(&both, &parts[next].counts);
            double alone = estimated_bits(&parts[next].counts), joined = estimated_bits(&both);
            if (joined > bits + alone + WORTH_A_BLOCK)
                break;
            part->counts = both;
            part->num_sequences += parts[next].num_sequences;
            part->nbytes += parts[next].nbytes;
            bits = joined;
        }
        put_block(self, to, sequences, data, part, is_last && next == num_parts);
        sequences += part->num_sequences;
        data += part->nbytes;
    }
}

static void prepare_search(Encoder *self, const uint8_t *data, size_t nbytes)
{
    Counts counts = {{0}, {0}};
    count_bytes(data, nbytes, counts.main);
    self->literal_bits = (float)(estimated_bits(&counts) / (double)nbytes);
    self->gives_up |= nbytes > TRIAL && self->literal_bits < FEWEST_BITS;
    self->depth = self->is_trial ? 16 : nbytes <= TRIAL ? 64 : 48;
    for (self->least = 3; self->least < LONGEST_KEY && !is_worth(self, self->least, 64);)
        self->least++;
    for (self->hash_bits = 6; self->hash_bits < HASH_BITS && nbytes >> self->hash_bits;)
        self->hash_bits++;
    memset(self->heads, 0, sizeof *self->heads << self->hash_bits);
}

/* Bytes in one way of coding. */
static void put_coded(Encoder *self, Writer *to, const uint8_t *data, size_t nbytes, enum coding coding,
                      int is_varied, int is_last)
{
    const uint8_t *at = data, *end = data + nbytes;
    size_t most = is_varied || coding != LITERALS ? PART_TOKENS : BLOCK_TOKENS;
    if (coding == SEARCH)
        prepare_search(self, data, nbytes);
    while (at < end) {
        const uint8_t *begin = at;
        Sequence *to_fill = self->sequences;
        size_t num_parts = 0;
        for (; at < end && num_parts < BLOCK_TOKENS / most; num_parts++) {
            Part *part = self->parts + num_parts;
            const uint8_t *start = at;
            memset(part, 0, sizeof *part);
            part->num_sequences = coding == LITERALS ? take_literals(to_fill, &at, end, most)
                                  : coding == RUNS   ? take_runs(to_fill, data, &at, end, most)
                                                     : take_copies(self, to_fill, data, &at, end, most);
            part->nbytes = (size_t)(at - start);
            count_part(self, start, to_fill, part);
            to_fill += part->num_sequences;
        }
        put_parts(self, to, begin, self->parts, num_parts, is_last && at == end);
    }
}

/* The smallest of some codings, or stored blocks. */
static void put_piece(Encoder *self, Writer *to, const uint8_t *data, size_t nbytes, int codings,
                      int is_varied, int is_last)
{
    Writer before = *to, best = *to;
    if (!codings)
        put_stored(&best, data, nbytes, is_last);
    size_t least = 0;
    int found = 0;
    for (int coding = LITERALS; coding <= SEARCH; coding <<= 1) {
        if (!(codings & coding))
            continue;
        Writer trial = before;
        if (found)
            trial.out = self->other;
        put_coded(self, &trial, data, nbytes, (enum coding)coding, is_varied, is_last);
        size_t size = (size_t)(trial.out - (found ? self->other : before.out));
        if (found && size >= least)
            continue;
        if (found) {
            memcpy(before.out, self->other, size);
            trial.out = before.out + size;
        }
        least = size;
        best = trial;
        found = 1;
    }
    *to = best;
}

/* --- plans --- */

#define SAMPLE_WINDOW 512
#define SAMPLE_WINDOWS 8
#define NOISE_ENTROPY 7.92
#define MOST_COLLISION (1.0 / 17)
#define LEAST_EXCESS_PAIRS 0.03
#define MANY_PAIRS 0.7
#define MANY_ZEROS 0.2
#define MOST_ENTROPY_FOR_TRIAL 1.1
#define LEAST_REPEATS 0.0075
#define SPAN 65536
#define TABLE_COST 0.0008

typedef struct {
    int num_values, anchor;
    double entropy, collision, pairs, zeros, variation;
} Survey;

static double squares(const uint32_t *counts)
{
    double sum = 0;
    for (int value = 0; value < 256; value++)
        sum += (double)counts[value] * counts[value];
    return sum;
}

static void survey(const uint8_t *plane, size_t nbytes, Survey *facts)
{
    size_t available = nbytes / SAMPLE_WINDOW, window = available ? SAMPLE_WINDOW : nbytes;
    size_t step = available ? (available + SAMPLE_WINDOWS - 1) / SAMPLE_WINDOWS | 1 : 1;
    uint32_t counts[256] = {0}, windows[SAMPLE_WINDOWS][256];
    size_t num_windows = 0, num_pairs = 0, num_equal = 0;
    memset(windows, 0, sizeof windows);
    for (size_t at = 0; at < (available ? available : 1) && num_windows < SAMPLE_WINDOWS; at += step) {
        const uint8_t *part = plane + at * window;
        for (size_t i = 0; i < window; i++)
            windows[num_windows][part[i]]++;
        for (size_t i = 1; i < window; i++)
            num_equal += part[i] == part[i - 1];
        num_pairs += window - 1;
        num_windows++;
    }
    for (size_t i = 0; i < num_windows; i++)
        for (int value = 0; value < 256; value++)
            counts[value] += windows[i][value];
    double size = (double)(num_windows * window), logs = 0;
    int commonest = 0, anchor = -1;
    facts->num_values = 0;
    for (int value = 0; value < 256; value++) {
        if (!counts[value])
            continue;
        facts->num_values++;
        logs += counts[value] * log2_of(counts[value]);
        if (counts[value] > counts[commonest])
            commonest = value;
        /* The rarest of those at least half as frequent as all values are in noise. */
        if (512.0 * counts[value] >= size && (anchor < 0 || counts[value] < counts[anchor]))
            anchor = value;
    }
    facts->anchor = anchor < 0 ? 0 : anchor;
    facts->entropy = (size * log2_of((uint32_t)size) - logs + (facts->num_values - 1) / (2 * 0.6931471805599453)) / size;
    facts->collision = squares(counts) / (size * size);
    facts->pairs = num_pairs ? (double)num_equal / (double)num_pairs : 0;
    facts->zeros = counts[0] / size;
    /* What separate statistics for every window would save, in bits a byte. */
    double number = counts[commonest], others = size - number, equal_in_windows = -others;
    double equal_pairs = squares(counts) - number * number - others;
    for (size_t i = 0; i < num_windows; i++)
        equal_in_windows += squares(windows[i]) - (double)windows[i][commonest] * windows[i][commonest];
    facts->variation = 0;
    if (equal_in_windows > 0 && window > 1)
        facts->variation = others / size *
                           log2(equal_in_windows / (double)(window - 1) / equal_pairs * (size - 1));
}

/* Whether strings of eight bytes after an anchor often occur twice in the middle of the plane. */
static int has_repeats(Encoder *self, const uint8_t *plane, size_t nbytes, int anchor)
{
    size_t size = nbytes < SPAN ? nbytes : SPAN, num_strings = 0, num_equal = 0;
    const uint8_t *span = plane + (nbytes - size) / 2;
    if (size < 9)
        return 0;
    memset(self->heads, 0, sizeof self->heads);
    for (size_t i = 0; i < size - 8; i++) {
        const uint8_t *found = memchr(span + i, anchor, size - 8 - i);
        if (!found)
            break;
        i = (size_t)(found - span);
        uint64_t string = load64(span + i + 1);
        uint32_t *head = self->heads + (string * 0x9E3779B185EBCA87u >> (64 - HASH_BITS));
        num_equal += *head && load64(span + *head) == string;
        num_strings++;
        *head = (uint32_t)i + 1;
    }
    return num_strings && (double)num_equal / (double)num_strings > LEAST_REPEATS;
}

static size_t trial_nbytes(Encoder *self, const uint8_t *data, size_t nbytes, int coding, int is_varied)
{
    Writer to = {self->other, 0, 0};
    self->is_trial = 1;
    put_coded(self, &to, data, nbytes, (enum coding)coding, is_varied, 1);
    self->is_trial = 0;
    return (size_t)(to.out - self->other);
}

/* Whether copies win on a part of the plane. */
static int search_wins(Encoder *self, const uint8_t *plane, size_t nbytes, int simple, int is_varied)
{
    size_t size = nbytes < TRIED ? nbytes : TRIED;
    const uint8_t *part = plane + (nbytes - size) / 2;
    double searched = (double)trial_nbytes(self, part, size, SEARCH, is_varied);
    return searched <= LEAST_GAIN * (double)trial_nbytes(self, part, size, simple, is_varied);
}

/* The codings that may be smallest for a plane; none for stored blocks. */
static int plan_plane(Encoder *self, const uint8_t *plane, size_t nbytes, int *elements_differ,
                      int *is_varied)
{
    Survey facts;
    survey(plane, nbytes, &facts);
    *is_varied = 0;
    if (facts.num_values == 1)
        return RUNS;
    int has_excess = facts.pairs - facts.collision > LEAST_EXCESS_PAIRS;
    int has_runs = has_excess || facts.pairs > MANY_PAIRS;
    *is_varied = facts.variation > TABLE_COST * facts.num_values;
    int is_noise = facts.entropy > NOISE_ENTROPY;
    int is_masked = has_excess && facts.zeros > MANY_ZEROS && facts.entropy > MOST_ENTROPY_FOR_TRIAL;
    if (!is_noise && is_masked && nbytes > TRIAL) {
        *is_varied = 1;
        return RUNS;
    }
    int is_dense = !has_runs && !*is_varied && facts.collision < MOST_COLLISION;
    if (is_noise || is_dense) {
        int simple = is_noise ? 0 : LITERALS;
        if (!*elements_differ && has_repeats(self, plane, nbytes, facts.anchor))
            return simple | SEARCH;
        *elements_differ = 1;
        *is_varied = 0;
        return simple;
    }
    int simple = has_runs ? RUNS : LITERALS;
    return simple | (search_wins(self, plane, nbytes, simple, *is_varied) ? SEARCH : 0);
}

/* --- chunks --- */

#define LARGEST_SPARE (2 << 20)
static Spare spare;

Encoder *encoder_new(void)
{
    Encoder *self = spare_take(spare);
    if (!self && (self = calloc(1, sizeof *self)))
        make_symbols(self);
    return self;
}

void encoder_free(Encoder *self)
{
    if (self && self->capacity <= LARGEST_SPARE)
        self = spare_give(spare, self);
    if (!self)
        return;
    free(self->shuffled);
    free(self);
}

size_t encode_bound(size_t nbytes, size_t itemsize)
{
    /* Stored blocks of every plane and block, and eight bytes that are written ahead. */
    return 64 + nbytes + 5 * (nbytes / PART_TOKENS + 2 * itemsize + 2) + nbytes / 64;
}

INLINE uint32_t *few_heads(Encoder *self, uint64_t string)
{
    return self->heads + (string * 0x9E3779B185EBCA87u >> (64 - FEW_HASH_BITS));
}

/* As `plan_plane`, where a survey would take longer than coding. */
static int plan_small(Encoder *self, const uint8_t *plane, size_t nbytes)
{
    size_t num_pairs = 0, num_repeats = 0;
    for (size_t i = 1; i < nbytes; i++)
        num_pairs += plane[i] == plane[i - 1];
    /* Strings of eight bytes that were there before, of which runs have many; no more than matter, and
     * only while there can be as many. An empty head is that of the first string. */
    size_t most = nbytes / 20 + num_pairs, end = nbytes < 8 ? 0 : nbytes - 7;
    uint64_t before = end ? load64(plane) : 0;
    uint32_t *head = few_heads(self, before);
    memset(self->heads, 0, sizeof *self->heads << FEW_HASH_BITS);
    for (size_t i = 1, stop; i < end && num_repeats <= most && num_repeats + end - i > most; i = stop)
        for (stop = end - i < PART_TOKENS / 8 ? end : i + PART_TOKENS / 8; i < stop; i++) {
            uint64_t string = load64(plane + i);
            if (string == before) {
                num_repeats++;
            } else {
                head = few_heads(self, string);
                num_repeats += load64(plane + *head) == string;
                before = string;
            }
            *head = (uint32_t)i;
        }
    int has_runs = 10 * num_pairs > nbytes;
    return (has_runs ? RUNS : LITERALS) | (num_repeats > most ? SEARCH : 0);
}

/* The planes of the shuffled bytes, the incomplete element with the last one. */
static void put_planes(Encoder *self, Writer *to, size_t nbytes, size_t itemsize)
{
    size_t count = nbytes / itemsize;
    int elements_differ = 0;
    for (size_t plane = 0; plane < itemsize; plane++) {
        const uint8_t *data = self->shuffled + plane * count;
        int is_last = plane + 1 == itemsize, is_varied = 0;
        int codings = nbytes < SMALL
                          ? plan_small(self, data, count)
                          : plan_plane(self, data, count, &elements_differ, &is_varied);
        size_t size = is_last ? nbytes - plane * count : count;
        put_piece(self, to, data, size, codings, is_varied, is_last);
    }
}

size_t encode_chunk(Encoder *self, const uint8_t *raw, size_t nbytes, size_t itemsize, uint8_t *out)
{
    size_t needed = encode_bound(nbytes, itemsize);
    if (needed > self->capacity) {
        free(self->shuffled);
        self->shuffled = malloc(3 * needed);
        self->capacity = self->shuffled ? needed : 0;
        if (!self->capacity)
            return 0;
        self->other = self->shuffled + needed;
        self->whole = self->other + needed;
    }
    self->gives_up = 0;
    shuffle(raw, self->shuffled, nbytes, itemsize);
    /* RFC 1950: deflate, a window of 32 KiB, no dictionary. */
    out[0] = 0x78;
    out[1] = 0x01;
    Writer to = {out + 2, 0, 0};
    if (itemsize == 1 && nbytes < SMALL) {
        put_piece(self, &to, self->shuffled, nbytes, ALL_CODINGS, 0, 1);
    } else {
        put_planes(self, &to, nbytes, itemsize);
    }
    align(&to);
    if (itemsize > 1 && nbytes <= TINY) {
        /* A code table for each plane may cost more than it wins. */
        Writer whole = {self->whole, 0, 0};
        put_piece(self, &whole, self->shuffled, nbytes, LITERALS | SEARCH, 0, 1);
        align(&whole);
        size_t size = (size_t)(whole.out - self->whole);
        if (size < (size_t)(to.out - out) - 2) {
            memcpy(out + 2, self->whole, size);
            to.out = out + 2 + size;
        }
    }
    uint32_t sum = adler32(self->shuffled, nbytes);
    for (int i = 0; i < 4; i++)
        *to.out++ = (uint8_t)(sum >> (24 - 8 * i));
    return self->gives_up ? 0 : (size_t)(to.out - out);
}
