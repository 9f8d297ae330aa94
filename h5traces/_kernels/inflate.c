/* Raw deflate (RFC 1951) inside of zlib streams (RFC 1950), up to four streams at a time.
 *
 * A Huffman decoder waits for every look-up, since where the next code begins depends on it. So several
 * streams are decoded in turn, and an entry of the table holds two literals where their codes fit
 * into its bits. What zlib would reject fails, and so do codes that nothing can encode with. */
#include "kernels.h"

/* An entry has its number of bits in the lowest 8 bits, so that the entry itself can be a shift. One or
 * two literals follow, and how many; or extra bits, a value and a kind, and the highest bit is set. */
#define LITERAL(symbol) ((uint32_t)(symbol) << 8 | 1u << 24)
#define IS_LITERAL(entry) (!((entry) >> 31))
#define NUM_LITERALS(entry) ((entry) >> 24)
#define NUM_BITS(entry) ((entry) & 63)
enum { COPY, END_OF_BLOCK, LONG_CODE, INVALID };
#define ENTRY(kind, value, extra) \
    (1u << 31 | (uint32_t)(kind) << 28 | (uint32_t)(value) << 12 | (uint32_t)(extra) << 8)
#define KIND(entry) ((entry) >> 28 & 3)
#define EXTRA(entry) ((entry) >> 8 & 15)
#define VALUE(entry) ((entry) >> 12 & 0xFFFF)
/* Codes that one load of bits is enough for, and the bytes that a round of them writes at most. */
#define ROUND 4
#define ROUND_NBYTES (2 * ROUND)
/* What a copy may write at once, and beyond its end. */
#define SHORT_COPY 32
#define MASK(num_bits) (((uint64_t)1 << (num_bits)) - 1)
/* Four tables of 10 bits are half of the fastest cache; those of longer codes are larger. */
#define LEAST_MAIN_BITS 10
#define MOST_CODE_BITS 15
/* Pairs in fewer bytes save less than making them takes. */
#define FEWEST_PAIRED 20000

static const uint16_t LENGTHS[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                     31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
const uint8_t LENGTH_EXTRA[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                         2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
const uint8_t SHORT_ORDER[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};

static uint32_t main_entry(unsigned symbol)
{
    if (symbol < 256)
        return LITERAL(symbol);
    if (symbol == 256)
        return ENTRY(END_OF_BLOCK, 0, 0);
    return symbol < 286 ? ENTRY(COPY, LENGTHS[symbol - 257], LENGTH_EXTRA[symbol - 257])
                        : ENTRY(INVALID, 0, 0);
}

static uint32_t distance_entry(unsigned symbol)
{
    unsigned extra = distance_extra(symbol), first = symbol < 2 ? symbol : (2 + symbol % 2) << extra;
    return symbol < 30 ? ENTRY(COPY, first + 1, extra) : ENTRY(INVALID, 0, 0);
}

static uint32_t plain_entry(unsigned symbol)
{
    return ENTRY(COPY, symbol, 0);
}

INLINE unsigned reversed(unsigned code, unsigned num_bits)
{
    code = (code & 0x5555) << 1 | (code >> 1 & 0x5555);
    code = (code & 0x3333) << 2 | (code >> 2 & 0x3333);
    code = (code & 0x0F0F) << 4 | (code >> 4 & 0x0F0F);
    code = (code & 0x00FF) << 8 | (code >> 8 & 0x00FF);
    return code >> (16 - num_bits);
}

/* Fill a table of 2^table_bits entries from the lengths of codes. Whether zlib would take them:
 * complete, or a single code of one bit where `may_be_short`, or, then, none at all. */
static int build(Codes *codes, uint32_t *table, unsigned table_bits, const uint8_t *lengths,
                 unsigned num_symbols, uint32_t (*entry_of)(unsigned), int may_be_short)
{
    uint16_t first_codes[16], places[16];
    memset(codes->counts, 0, sizeof codes->counts);
    for (unsigned symbol = 0; symbol < num_symbols; symbol++)
        codes->counts[lengths[symbol]]++;
    unsigned num_used = num_symbols - codes->counts[0], code = 0, place = 0, longest = 0;
    codes->counts[0] = 0;
    int left = 1;
    for (unsigned bits = 1; bits <= MOST_CODE_BITS; bits++) {
        left = 2 * left - codes->counts[bits];
        if (left < 0)
            return 0;
        code = (code + codes->counts[bits - 1]) << 1;
        first_codes[bits] = (uint16_t)code;
        places[bits] = (uint16_t)place;
        place += codes->counts[bits];
        if (codes->counts[bits])
            longest = bits;
    }
    if (left && !(may_be_short && longest <= 1))
        return 0;
    if (left)
        for (unsigned i = 0; i < 1u << table_bits; i++)
            table[i] = ENTRY(INVALID, 0, 0) | 1;
    if (!num_used)
        return 1;
    uint16_t next_places[16];
    memcpy(next_places, places, sizeof places);
    for (unsigned symbol = 0; symbol < num_symbols; symbol++)
        if (lengths[symbol])
            codes->symbols[next_places[lengths[symbol]]++] = (uint16_t)symbol;
    /* Grow the table with the length of codes: what is there is repeated, which copies fast. */
    unsigned filled_bits = 0;
    table[0] = ENTRY(INVALID, 0, 0) | 1;
    for (unsigned bits = 1; bits <= longest; bits++) {
        if (bits <= table_bits && !left) {
            memcpy(table + (1u << filled_bits), table, sizeof *table << filled_bits);
            filled_bits = bits;
        }
        for (unsigned i = 0; i < codes->counts[bits]; i++) {
            unsigned at = reversed(first_codes[bits] + i, bits);
            if (bits > table_bits) {
                table[at & ((1u << table_bits) - 1)] = ENTRY(LONG_CODE, 0, 0);
                continue;
            }
            uint32_t entry = entry_of(codes->symbols[places[bits] + i]) | bits;
            unsigned size = left ? 1u << table_bits : 1u << bits;
            for (; at < size; at += 1u << bits)
                table[at] = entry;
        }
    }
    for (; !left && filled_bits < table_bits; filled_bits++)
        memcpy(table + (1u << filled_bits), table, sizeof *table << filled_bits);
    return 1;
}

/* Add the literal that follows to every entry of a literal, where both codes are known. */
static void pair_literals(uint32_t *table, unsigned table_bits)
{
    /* From the end, since the entries looked at are those below. */
    for (unsigned i = 1u << table_bits; i-- > 0;) {
        uint32_t entry = table[i], next = table[i >> NUM_BITS(entry)];
        unsigned num_bits = NUM_BITS(entry) + NUM_BITS(next);
        uint32_t both = (entry & 0xFF00) | (next & 0xFF00) << 8 | 2u << 24 | num_bits;
        int fits = IS_LITERAL(entry | next) && num_bits <= table_bits;
        table[i] = fits ? both : entry;
    }
}

/* Whether pairs save more than they take: some must fit, and there must be bytes to be decoded. */
static int are_paired(const Inflater *self)
{
    unsigned shortest = 1;
    while (shortest < MAIN_BITS && !self->main_codes.counts[shortest])
        shortest++;
    return 2 * shortest <= self->main_bits && self->out_end - self->out > FEWEST_PAIRED;
}

/* The next bits, at least 57; zeros after the end. */
INLINE uint64_t peek(const Inflater *self)
{
    uint64_t place = self->at >> 3, bits = 0;
    if (LIKELY(place + 8 <= self->in_nbytes))
        return load64(self->in + place) >> (self->at & 7);
    for (uint64_t i = place; i < self->in_nbytes; i++)
        bits |= (uint64_t)self->in[i] << 8 * (i - place);
    return bits >> (self->at & 7);
}

INLINE int is_beyond_input(const Inflater *self)
{
    return self->at > 8 * (uint64_t)self->in_nbytes;
}

INLINE unsigned take(Inflater *self, unsigned num_bits)
{
    unsigned value = (unsigned)(peek(self) & ((1u << num_bits) - 1));
    self->at += num_bits;
    return value;
}

static void fail(Inflater *self)
{
    self->state = FAILED;
}

/* The entry of a code that is too long for the table. */
static uint32_t searched(const Codes *codes, uint64_t bits, uint32_t (*entry_of)(unsigned))
{
    unsigned code = 0, first = 0, place = 0;
    for (unsigned length = 1; length <= MOST_CODE_BITS; length++, bits >>= 1) {
        unsigned count = codes->counts[length];
        code |= (unsigned)bits & 1;
        if (code - first < count)
            return entry_of(codes->symbols[place + code - first]) | length;
        place += count;
        first = (first + count) << 1;
        code <<= 1;
    }
    return ENTRY(INVALID, 0, 0);
}

/* RFC 1951, 3.2.7 */
static int read_codes(Inflater *self)
{
    uint8_t lengths[320] = {0}, short_lengths[19] = {0};
    Codes codes;
    uint32_t table[128];
    unsigned num_main = take(self, 5) + 257, num_distances = take(self, 5) + 1;
    unsigned num_short = take(self, 4) + 4, num_all = num_main + num_distances;
    if (num_main > 286 || num_distances > 30)
        return 0;
    for (unsigned i = 0; i < num_short; i++)
        short_lengths[SHORT_ORDER[i]] = (uint8_t)take(self, 3);
    if (!build(&codes, table, 7, short_lengths, 19, plain_entry, 0))
        return 0;
    for (unsigned i = 0; i < num_all;) {
        uint32_t entry = table[peek(self) & 127];
        unsigned symbol = VALUE(entry), count = 1;
        if (KIND(entry) != COPY || (symbol == 16 && !i))
            return 0;
        self->at += NUM_BITS(entry);
        if (symbol >= 16)
            count = symbol == 16 ? 3 + take(self, 2) : symbol == 17 ? 3 + take(self, 3) : 11 + take(self, 7);
        if (count > num_all - i)
            return 0;
        memset(lengths + i, symbol < 16 ? (int)symbol : symbol == 16 ? lengths[i - 1] : 0, count);
        i += count;
    }
    if (is_beyond_input(self) || !lengths[256])
        return 0;
    self->main_bits = LEAST_MAIN_BITS;
    for (unsigned i = 0; i < num_main; i++)
        self->main_bits = lengths[i] > self->main_bits ? lengths[i] : self->main_bits;
    self->main_bits = self->main_bits < MAIN_BITS ? self->main_bits : MAIN_BITS;
    return build(&self->main_codes, self->main_table, self->main_bits, lengths, num_main, main_entry, 1) &&
           build(&self->distance_codes, self->distance_table, DISTANCE_BITS, lengths + num_main,
                 num_distances, distance_entry, 1);
}

void fixed_lengths(uint8_t main_lengths[288], uint8_t distance_lengths[32])
{
    memset(main_lengths, 8, 288);
    memset(main_lengths + 144, 9, 112);
    memset(main_lengths + 256, 7, 24);
    memset(distance_lengths, 5, 32);
}

static int fixed_codes(Inflater *self)
{
    uint8_t lengths[288], distances[32];
    fixed_lengths(lengths, distances);
    self->main_bits = LEAST_MAIN_BITS;
    return build(&self->main_codes, self->main_table, self->main_bits, lengths, 288, main_entry, 0) &&
           build(&self->distance_codes, self->distance_table, DISTANCE_BITS, distances, 32,
                 distance_entry, 0);
}

/* RFC 1951, 3.2.4 */
static int copy_stored(Inflater *self)
{
    uint64_t place = (self->at + 7) >> 3;
    if (place + 4 > self->in_nbytes)
        return 0;
    const uint8_t *from = self->in + place;
    size_t length = load16(from);
    if ((length ^ 0xFFFF) != load16(from + 2))
        return 0;
    if (length > self->in_nbytes - place - 4 || length > (size_t)(self->out_end - self->out))
        return 0;
    memcpy(self->out, from + 4, length);
    self->at = 8 * (place + 4 + length);
    self->out += length;
    return 1;
}

/* Go on to the codes of a block of codes, or to the end. */
static void read_headers(Inflater *self)
{
    while (self->state == AT_HEADER) {
        if (self->is_last) {
            self->state = FINISHED;
            return;
        }
        self->is_last = (int)take(self, 1);
        unsigned type = take(self, 2);
        if (!type) {
            if (!copy_stored(self))
                fail(self);
            continue;
        }
        if (is_beyond_input(self) || type == 3 || !(type == 2 ? read_codes(self) : fixed_codes(self))) {
            fail(self);
            return;
        }
        if (are_paired(self))
            pair_literals(self->main_table, self->main_bits);
        self->state = IN_CODES;
    }
}

/* Copy in words, up to SHORT_COPY bytes at once; what follows them may be written to. */
INLINE void copy_back(uint8_t *out, size_t distance, size_t length)
{
    const uint8_t *from = out - distance, *end = out + length;
    if (distance == 1) {
        uint64_t run = 0x0101010101010101u * *from;
        do {
            for (int i = 0; i < SHORT_COPY; i += 8)
                store64(out + i, run);
            out += SHORT_COPY;
        } while (out < end);
    } else if (distance >= 8) {
        do {
            store64(out, load64(from));
            out += 8;
            from += 8;
        } while (out < end);
    } else {
        do
            *out++ = *from++;
        while (out < end);
    }
}

/* One code, and the copy that it may begin, wherever it is. */
static void take_code(Inflater *self, uint32_t entry)
{
    uint64_t bits = peek(self);
    size_t room = (size_t)(self->out_end - self->out);
    if (UNLIKELY(KIND(entry) == LONG_CODE && !IS_LITERAL(entry)))
        entry = searched(&self->main_codes, bits, main_entry);
    self->at += NUM_BITS(entry);
    if (IS_LITERAL(entry)) {
        /* Two that do not fit, or of which one lies beyond the input, are an error in any case. */
        if (NUM_LITERALS(entry) > room || is_beyond_input(self)) {
            fail(self);
            return;
        }
        for (unsigned i = 0; i < NUM_LITERALS(entry); i++)
            *self->out++ = (uint8_t)(entry >> (8 + 8 * i));
        return;
    }
    if (KIND(entry) != COPY) {
        self->state = KIND(entry) == END_OF_BLOCK && !is_beyond_input(self) ? AT_HEADER : FAILED;
        return;
    }
    bits >>= NUM_BITS(entry);
    size_t length = VALUE(entry) + (bits & ((1u << EXTRA(entry)) - 1));
    bits >>= EXTRA(entry);
    self->at += EXTRA(entry);
    entry = self->distance_table[bits & MASK(DISTANCE_BITS)];
    if (UNLIKELY(KIND(entry) == LONG_CODE))
        entry = searched(&self->distance_codes, bits, distance_entry);
    bits >>= NUM_BITS(entry);
    size_t distance = VALUE(entry) + (bits & ((1u << EXTRA(entry)) - 1));
    self->at += NUM_BITS(entry) + EXTRA(entry);
    if (KIND(entry) != COPY || is_beyond_input(self) || length > room ||
        distance > (size_t)(self->out - self->start)) {
        fail(self);
        return;
    }
    if (LIKELY(length + SHORT_COPY <= room))
        copy_back(self->out, distance, length);
    else
        for (size_t i = 0; i < length; i++)
            self->out[i] = self->out[i - distance];
    self->out += length;
}

/* How many rounds neither read beyond the input nor write beyond the output. */
INLINE size_t safe_rounds(const Inflater *self)
{
    size_t of_input = (self->in_nbytes - (size_t)(self->at >> 3)) / 8;
    size_t of_output = (size_t)(self->out_end - self->out) / ROUND_NBYTES;
    size_t least = of_input < of_output ? of_input : of_output;
    return least ? least - 1 : 0;
}

/* Streams in turn, a code of each, until one is near an end or done with its block. Above the bits stands
 * a one, so that the zeros above that tell how many were taken. */
INLINE void decode_lanes(Inflater *const *streams, const int count)
{
    const uint64_t top = (uint64_t)1 << 63;
    uint64_t bits[NUM_LANES];
    uint8_t *out[NUM_LANES];
    const uint32_t *tables[NUM_LANES];
    uint64_t masks[NUM_LANES];
    size_t rounds = SIZE_MAX;
    for (int i = 0; i < count; i++) {
        size_t safe = safe_rounds(streams[i]);
        rounds = safe < rounds ? safe : rounds;
        tables[i] = streams[i]->main_table;
        masks[i] = MASK(streams[i]->main_bits);
        out[i] = streams[i]->out;
        bits[i] = top;
    }
    while (rounds) {
        rounds--;
        for (int i = 0; i < count; i++) {
            uint64_t at = streams[i]->at += (unsigned)__builtin_clzll(bits[i]);
            bits[i] = load64(streams[i]->in + (at >> 3)) >> (at & 7) | top;
        }
        uint32_t entries[NUM_LANES], all = 0;
        for (int step = 0; step < ROUND; step++) {
            all = 0;
            for (int i = 0; i < count; i++)
                all |= entries[i] = tables[i][bits[i] & masks[i]];
            if (UNLIKELY(!IS_LITERAL(all)))
                break;
            for (int i = 0; i < count; i++) {
                uint16_t both = (uint16_t)(entries[i] >> 8);
                memcpy(out[i], &both, sizeof both);
                out[i] += NUM_LITERALS(entries[i]);
                bits[i] >>= entries[i] & 63;
            }
        }
        if (LIKELY(IS_LITERAL(all)))
            continue;
        unsigned others = 0;
        for (int i = 0; i < count; i++) {
            streams[i]->at += (unsigned)__builtin_clzll(bits[i]);
            streams[i]->out = out[i];
            streams[i]->entry = entries[i];
            others |= entries[i] >> 31 << i;
            bits[i] = top;
        }
        /* Which of them is no literal cannot be foreseen, so there is no branch for each. */
        for (; others; others &= others - 1) {
            Inflater *stream = streams[__builtin_ctz(others)];
            take_code(stream, stream->entry);
            size_t safe = stream->state == IN_CODES ? safe_rounds(stream) : 0;
            rounds = safe < rounds ? safe : rounds;
        }
        for (int i = 0; i < count; i++)
            out[i] = streams[i]->out;
    }
    for (int i = 0; i < count; i++) {
        streams[i]->at += (unsigned)__builtin_clzll(bits[i]);
        streams[i]->out = out[i];
    }
}

/* A stream alone waits for its own bits, so these are kept while others are loaded above them. */
INLINE void decode_1_body(Inflater *const *streams)
{
    Inflater *self = *streams;
    const uint32_t *table = self->main_table;
    const uint64_t mask = MASK(self->main_bits);
    for (size_t rounds; self->state == IN_CODES && (rounds = safe_rounds(self));) {
        const uint8_t *in = self->in + (self->at >> 3);
        uint64_t bits = load64(in) >> (self->at & 7), num_bits = 56 - (self->at & 7);
        uint8_t *out = self->out;
        uint32_t entry = 0;
        for (in += 7; rounds && IS_LITERAL(entry); rounds--) {
            bits |= load64(in) << (num_bits & 63);
            in += 7 - (num_bits >> 3 & 7);
            num_bits |= 56;
            for (int step = 0; step < ROUND; step++) {
                entry = table[bits & mask];
                if (UNLIKELY(!IS_LITERAL(entry)))
                    break;
                uint16_t both = (uint16_t)(entry >> 8);
                memcpy(out, &both, sizeof both);
                out += NUM_LITERALS(entry);
                bits >>= entry & 63;
                /* What stands above the lowest 6 bits says nothing. */
                num_bits -= entry;
            }
        }
        self->at = 8 * (uint64_t)(in - self->in) - (num_bits & 63);
        self->out = out;
        if (!IS_LITERAL(entry))
            take_code(self, entry);
    }
}

DISPATCH(static, decode_1, (Inflater *const *streams), (streams))

#define DECODE(count) \
    INLINE void decode_##count##_body(Inflater *const *streams) \
    { \
        decode_lanes(streams, count); \
    } \
    DISPATCH(static, decode_##count, (Inflater *const *streams), (streams))
DECODE(2)
DECODE(3)
DECODE(4)

void inflate_begin(Inflater *self, const uint8_t *in, size_t nbytes, uint8_t *out, size_t out_nbytes)
{
    self->in = in;
    self->start = self->out = out;
    self->out_end = out + out_nbytes;
    self->is_last = 0;
    self->state = AT_HEADER;
    /* RFC 1950, 2.2: deflate, a window of at most 32 KiB, no dictionary. The checksum at the end
     * is no part of the blocks. */
    if (nbytes < 6 || (in[0] & 15) != 8 || in[0] >> 4 > 7 || (in[0] << 8 | in[1]) % 31 || in[1] & 32) {
        fail(self);
        return;
    }
    self->in_nbytes = nbytes - 4;
    self->at = 16;
}

/* Everything up to codes that can be decoded fast, or to the end. */
static void advance(Inflater *self)
{
    while (self->state == AT_HEADER || (self->state == IN_CODES && !safe_rounds(self))) {
        if (self->state == AT_HEADER)
            read_headers(self);
        else
            take_code(self, self->main_table[peek(self) & MASK(self->main_bits)]);
    }
}

void inflate_some(Inflater *const *streams, int count)
{
    static void (*const decode[NUM_LANES])(Inflater *const *) = {decode_1, decode_2, decode_3, decode_4};
    for (;;) {
        for (int i = 0; i < count; i++)
            advance(streams[i]);
        for (int i = 0; i < count; i++)
            if (streams[i]->state != IN_CODES)
                return;
        decode[count - 1](streams);
    }
}

int inflate_is_whole(const Inflater *self)
{
    if (self->state != FINISHED || self->out != self->out_end || (self->at + 7) >> 3 != self->in_nbytes)
        return 0;
    const uint8_t *end = self->in + self->in_nbytes;
    uint32_t expected = (uint32_t)end[0] << 24 | (uint32_t)end[1] << 16 | (uint32_t)end[2] << 8 | end[3];
    return adler32(self->start, (size_t)(self->out - self->start)) == expected;
}
