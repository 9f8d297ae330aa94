/* Raw deflate (RFC 1951) inside of zlib streams (RFC 1950), one or two streams at a time.
 *
 * A Huffman decoder waits for every look-up, since where the next code begins depends on it. So two
 * streams are decoded in turn, and an entry of the table holds two literals where their codes fit
 * into its 12 bits. What zlib would reject fails, and so do codes that nothing can encode with. */
#include "kernels.h"

/* An entry has its number of bits in the lowest 6 bits, so that the entry itself can be a shift, and the
 * number of literals, 1 or 2, in the next two; the literals follow. Without literals: */
#define NUM_LITERALS(entry) ((entry) >> 6 & 3)
#define KIND(entry) ((entry) >> 8 & 3)
enum { COPY, END_OF_BLOCK, LONG_CODE, INVALID };
#define ENTRY(kind, value, extra) ((uint32_t)(kind) << 8 | (uint32_t)(extra) << 10 | (uint32_t)(value) << 16)
#define EXTRA(entry) ((entry) >> 10 & 15)
#define VALUE(entry) ((entry) >> 16)
/* Bytes that the fast loops may read at once, and that they may write: literals, and a copy that is
 * no longer than SHORT_COPY, which is written as a whole. */
#define FAST_INPUT 16
#define FAST_OUTPUT 48
#define SHORT_COPY 32
#define MAIN_MASK ((1u << MAIN_BITS) - 1)
#define DISTANCE_MASK ((1u << DISTANCE_BITS) - 1)
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
        return symbol << 8 | 1 << 6;
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
static void pair_literals(uint32_t *table)
{
    /* From the end, since the entries looked at are those below. */
    for (unsigned i = MAIN_MASK + 1; i-- > 0;) {
        uint32_t entry = table[i], next = table[i >> (entry & 63)];
        unsigned num_bits = (entry & 63) + (next & 63);
        uint32_t both = (entry & 0xFF00) | (next & 0xFF00) << 8 | 2 << 6 | num_bits;
        int fits = (entry & next & 1 << 6) && num_bits <= MAIN_BITS;
        table[i] = fits ? both : entry;
    }
}

/* Whether pairs save more than they take: some must fit, and there must be bytes to be decoded. */
static int are_paired(const Inflater *self)
{
    unsigned shortest = 1;
    while (shortest < MAIN_BITS && !self->main_codes.counts[shortest])
        shortest++;
    return 2 * shortest <= MAIN_BITS && self->out_end - self->out > FEWEST_PAIRED;
}

/* Input a byte at a time: never more than there is. */
INLINE void fill(Inflater *self)
{
    while (self->num_bits < 56 && self->in < self->in_end) {
        self->bits |= (uint64_t)*self->in++ << self->num_bits;
        self->num_bits += 8;
    }
}

INLINE unsigned take(Inflater *self, unsigned num_bits)
{
    unsigned value = (unsigned)(self->bits & ((1u << num_bits) - 1));
    self->bits >>= num_bits;
    self->num_bits -= num_bits;
    return value;
}

static void fail(Inflater *self)
{
    self->state = FAILED;
}

/* The symbol of the code that `bits` begin with, and its length in the bits above 16; or -1. */
static int search(const Codes *codes, uint64_t bits)
{
    int code = 0, first = 0, place = 0;
    for (int length = 1; length <= MOST_CODE_BITS; length++) {
        code |= (int)(bits & 1);
        bits >>= 1;
        int count = codes->counts[length];
        if (code - first < count)
            return codes->symbols[place + code - first] | length << 16;
        place += count;
        first = (first + count) << 1;
        code <<= 1;
    }
    return -1;
}

/* RFC 1951, 3.2.7 */
static int read_codes(Inflater *self)
{
    uint8_t lengths[320] = {0}, short_lengths[19] = {0};
    Codes codes;
    uint32_t table[128];
    fill(self);
    if (self->num_bits < 14)
        return 0;
    unsigned num_main = take(self, 5) + 257, num_distances = take(self, 5) + 1;
    unsigned num_short = take(self, 4) + 4, num_all = num_main + num_distances;
    if (num_main > 286 || num_distances > 30)
        return 0;
    for (unsigned i = 0; i < num_short; i++) {
        fill(self);
        if (self->num_bits < 3)
            return 0;
        short_lengths[SHORT_ORDER[i]] = (uint8_t)take(self, 3);
    }
    if (!build(&codes, table, 7, short_lengths, 19, plain_entry, 0))
        return 0;
    for (unsigned i = 0; i < num_all;) {
        fill(self);
        uint32_t entry = table[self->bits & 127];
        unsigned symbol = VALUE(entry), repeated = 0, count = 1;
        if (KIND(entry) != COPY || self->num_bits < (entry & 63))
            return 0;
        take(self, entry & 63);
        unsigned extra = symbol < 16 ? 0 : symbol == 16 ? 2 : symbol == 17 ? 3 : 7;
        if (self->num_bits < extra || (symbol == 16 && !i))
            return 0;
        if (symbol < 16)
            repeated = symbol;
        else {
            count = take(self, extra) + (symbol == 18 ? 11 : 3);
            repeated = symbol == 16 ? lengths[i - 1] : 0;
        }
        if (count > num_all - i)
            return 0;
        memset(lengths + i, (int)repeated, count);
        i += count;
    }
    if (!lengths[256])
        return 0;
    return build(&self->main_codes, self->main_table, MAIN_BITS, lengths, num_main, main_entry, 1) &&
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
    return build(&self->main_codes, self->main_table, MAIN_BITS, lengths, 288, main_entry, 0) &&
           build(&self->distance_codes, self->distance_table, DISTANCE_BITS, distances, 32,
                 distance_entry, 0);
}

/* RFC 1951, 3.2.4 */
static int copy_stored(Inflater *self)
{
    take(self, self->num_bits & 7);
    self->in -= self->num_bits / 8;
    self->bits = 0;
    self->num_bits = 0;
    if (self->in_end - self->in < 4)
        return 0;
    size_t length = load16(self->in);
    if ((length ^ 0xFFFF) != load16(self->in + 2))
        return 0;
    self->in += 4;
    if (length > (size_t)(self->in_end - self->in) || length > (size_t)(self->out_end - self->out))
        return 0;
    memcpy(self->out, self->in, length);
    self->in += length;
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
        fill(self);
        if (self->num_bits < 3) {
            fail(self);
            return;
        }
        self->is_last = (int)take(self, 1);
        unsigned type = take(self, 2);
        if (!type) {
            if (!copy_stored(self))
                fail(self);
            continue;
        }
        if (type == 3 || !(type == 2 ? read_codes(self) : fixed_codes(self))) {
            fail(self);
            return;
        }
        if (are_paired(self))
            pair_literals(self->main_table);
        self->state = IN_CODES;
    }
}

/* What changes at every code, apart from the rest, so that it stays in registers. */
typedef struct {
    uint64_t bits;
    unsigned num_bits;
    const uint8_t *in;
    uint8_t *out;
} Lane;

INLINE Lane lane_of(const Inflater *self)
{
    Lane lane = {self->bits, self->num_bits, self->in, self->out};
    return lane;
}

INLINE void put_back(Inflater *self, Lane lane)
{
    self->bits = lane.bits;
    self->num_bits = lane.num_bits;
    self->in = lane.in;
    self->out = lane.out;
}

/* At least 56 bits, eight bytes at a time; bits above `num_bits` are those of the next byte. */
INLINE void fill_fast(Lane *lane)
{
    lane->bits |= load64(lane->in) << lane->num_bits;
    lane->in += (63 - lane->num_bits) >> 3;
    lane->num_bits |= 56;
}

INLINE void drop(Lane *lane, uint32_t num_bits)
{
    lane->bits >>= num_bits & 63;
    lane->num_bits -= num_bits & 63;
}

INLINE void put_literals(Lane *lane, uint32_t entry)
{
    uint16_t both = (uint16_t)(entry >> 8);
    memcpy(lane->out, &both, sizeof both);
    lane->out += NUM_LITERALS(entry);
    drop(lane, entry);
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

/* What is no literal of the table, with at least 20 bits at hand. Whether the block goes on. */
INLINE int rare(Inflater *self, Lane *lane, uint32_t entry)
{
    if (KIND(entry) == LONG_CODE) {
        int found = search(&self->main_codes, lane->bits);
        if (found < 0) {
            fail(self);
            return 0;
        }
        entry = main_entry((unsigned)found & 0xFFFF) | (uint32_t)found >> 16;
    }
    if (NUM_LITERALS(entry)) {
        put_literals(lane, entry);
        return 1;
    }
    drop(lane, entry);
    if (KIND(entry) != COPY) {
        self->state = KIND(entry) == END_OF_BLOCK ? AT_HEADER : FAILED;
        return 0;
    }
    size_t length = VALUE(entry) + (lane->bits & ((1u << EXTRA(entry)) - 1));
    drop(lane, EXTRA(entry));
    fill_fast(lane);
    entry = self->distance_table[lane->bits & DISTANCE_MASK];
    if (UNLIKELY(KIND(entry) != COPY)) {
        int found = KIND(entry) == LONG_CODE ? search(&self->distance_codes, lane->bits) : -1;
        if (found >= 0)
            entry = distance_entry((unsigned)found & 0xFFFF) | (uint32_t)found >> 16;
        if (KIND(entry) != COPY) {
            fail(self);
            return 0;
        }
    }
    drop(lane, entry);
    size_t distance = VALUE(entry) + (lane->bits & ((1u << EXTRA(entry)) - 1));
    drop(lane, EXTRA(entry));
    size_t room = (size_t)(self->out_end - lane->out);
    if (distance > (size_t)(lane->out - self->start) || length > room) {
        fail(self);
        return 0;
    }
    if (LIKELY(length + SHORT_COPY <= room))
        copy_back(lane->out, distance, length);
    else
        for (size_t i = 0; i < length; i++)
            lane->out[i] = lane->out[i - distance];
    lane->out += length;
    return 1;
}

INLINE int is_far_from_ends(const Inflater *self, const Lane *lane)
{
    return self->in_end - lane->in >= FAST_INPUT && self->out_end - lane->out >= FAST_OUTPUT;
}

INLINE void decode_one_body(Inflater *self)
{
    Lane lane = lane_of(self);
    while (is_far_from_ends(self, &lane)) {
        fill_fast(&lane);
        uint32_t entry = 0;
        for (int i = 0; i < 4; i++) {
            entry = self->main_table[lane.bits & MAIN_MASK];
            if (!NUM_LITERALS(entry))
                break;
            put_literals(&lane, entry);
        }
        if (!NUM_LITERALS(entry) && !rare(self, &lane, entry))
            break;
    }
    put_back(self, lane);
}

INLINE void decode_two_body(Inflater *first, Inflater *second)
{
    Lane one = lane_of(first), two = lane_of(second);
    const uint32_t *table = first->main_table, *other = second->main_table;
    while (is_far_from_ends(first, &one) && is_far_from_ends(second, &two)) {
        fill_fast(&one);
        fill_fast(&two);
        uint32_t entry = 0, twin = 0;
        for (int i = 0; i < 4; i++) {
            entry = table[one.bits & MAIN_MASK];
            twin = other[two.bits & MAIN_MASK];
            if (UNLIKELY(!NUM_LITERALS(entry) || !NUM_LITERALS(twin)))
                break;
            put_literals(&one, entry);
            put_literals(&two, twin);
        }
        if (LIKELY(NUM_LITERALS(entry) && NUM_LITERALS(twin)))
            continue;
        int goes_on = 1;
        if (!NUM_LITERALS(entry))
            goes_on &= rare(first, &one, entry);
        if (!NUM_LITERALS(twin))
            goes_on &= rare(second, &two, twin);
        if (!goes_on)
            break;
    }
    put_back(first, one);
    put_back(second, two);
}

DISPATCH(decode_one, (Inflater * self), (self))
DISPATCH(decode_two, (Inflater * first, Inflater *second), (first, second))

/* The symbol of the next code, which is taken; -1 where the input ends or nothing has that code. */
static int take_symbol(Inflater *self, const Codes *codes)
{
    fill(self);
    int found = search(codes, self->bits);
    if (found < 0 || (unsigned)found >> 16 > self->num_bits)
        return -1;
    take(self, (unsigned)found >> 16);
    return found & 0xFFFF;
}

/* A length or distance with the bits that follow its code; -1 where there is none. */
static int take_value(Inflater *self, uint32_t entry)
{
    if (KIND(entry) != COPY || EXTRA(entry) > self->num_bits)
        return -1;
    return (int)(VALUE(entry) + take(self, EXTRA(entry)));
}

/* Codes near the ends of input or output, one at a time, until they are far again. */
static void decode_carefully(Inflater *self)
{
    while (self->state == IN_CODES) {
        int symbol = take_symbol(self, &self->main_codes);
        if (symbol == 256) {
            self->state = AT_HEADER;
            return;
        }
        if (symbol >= 0 && symbol < 256 && self->out < self->out_end) {
            *self->out++ = (uint8_t)symbol;
            continue;
        }
        int length = symbol > 256 ? take_value(self, main_entry((unsigned)symbol)) : -1, distance = -1;
        if (length > 0 && (symbol = take_symbol(self, &self->distance_codes)) >= 0)
            distance = take_value(self, distance_entry((unsigned)symbol));
        if (distance < 0 || distance > self->out - self->start || length > self->out_end - self->out) {
            fail(self);
            return;
        }
        for (; length; length--, self->out++)
            *self->out = self->out[-distance];
    }
}

void inflate_begin(Inflater *self, const uint8_t *in, size_t nbytes, uint8_t *out, size_t out_nbytes)
{
    self->in = in;
    self->in_end = in + nbytes;
    self->start = self->out = out;
    self->out_end = out + out_nbytes;
    self->bits = 0;
    self->num_bits = 0;
    self->is_last = 0;
    self->state = AT_HEADER;
    /* RFC 1950, 2.2: deflate, a window of at most 32 KiB, no dictionary. The checksum at the end
     * is no part of the blocks. */
    if (nbytes < 6 || (in[0] & 15) != 8 || in[0] >> 4 > 7 || (in[0] << 8 | in[1]) % 31 || in[1] & 32) {
        fail(self);
        return;
    }
    self->in += 2;
    self->in_end -= 4;
}

static int can_go_fast(const Inflater *self)
{
    Lane lane = lane_of(self);
    return self->state == IN_CODES && is_far_from_ends(self, &lane);
}

/* Everything up to codes that can be decoded fast, or to the end. */
static void advance(Inflater *self)
{
    while (self->state == AT_HEADER || (self->state == IN_CODES && !can_go_fast(self))) {
        if (self->state == AT_HEADER)
            read_headers(self);
        else
            decode_carefully(self);
    }
}

void inflate_one(Inflater *self)
{
    for (advance(self); self->state == IN_CODES; advance(self))
        decode_one(self);
}

void inflate_two(Inflater *first, Inflater *second)
{
    for (;;) {
        advance(first);
        advance(second);
        if (first->state != IN_CODES || second->state != IN_CODES)
            return;
        decode_two(first, second);
    }
}

int inflate_is_whole(const Inflater *self)
{
    /* Whole bytes that were taken in before they were needed are no part of the blocks. */
    const uint8_t *end = self->in - self->num_bits / 8;
    if (self->state != FINISHED || self->out != self->out_end || end != self->in_end)
        return 0;
    uint32_t expected = (uint32_t)end[0] << 24 | (uint32_t)end[1] << 16 | (uint32_t)end[2] << 8 | end[3];
    return adler32(self->start, (size_t)(self->out - self->start)) == expected;
}
