/* Many chunks in one call: each is read, compared with its checksum, inflated and restored.
 *
 * Every row is checked against the buffers before anything is touched, whatever it says. A row that
 * is wrong, or not known here, is left as not done, and Python decides. */
/* pread and signals are of POSIX, not of C. */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64
#include "kernels.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#define MOST_THREADS 64
/* Starting another thread pays from this many bytes on. */
#define LEAST_PER_THREAD (128 << 10)

typedef struct {
    const Plan *plan;
    size_t next; /* row that nobody has taken yet */
    int num_lanes; /* that a thread takes at once, so that others get some of few rows */
} Work;

/* A chunk on its way, and memory that is kept for the next one. */
typedef struct {
    Inflater inflater;
    const Row *row; /* NULL: free */
    size_t number;
    uint8_t *stored, *planes;
    size_t stored_nbytes, planes_nbytes;
} Slot;

static size_t take_next(Work *work)
{
    return __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
}

static size_t restored_itemsize(const Row *row)
{
    switch (row->restoring) {
    case AS_STORED:
        return (size_t)row->itemsize;
    case STEPS_TO_FLOAT16:
    case TABLE_OF_2_BYTES:
        return 2;
    default:
        return 4;
    }
}

static int fits(int64_t start, int64_t nbytes, size_t total)
{
    return start >= 0 && nbytes >= 0 && (uint64_t)nbytes <= total &&
           (uint64_t)start <= total - (uint64_t)nbytes;
}

/* What the table must have for this way of restoring, in bytes; -1 where the row is impossible. */
static int64_t table_nbytes(const Row *row)
{
    switch (row->restoring) {
    case AS_STORED:
        return 0;
    case STEPS_TO_FLOAT16:
    case STEPS_TO_FLOAT32:
        return row->width > 0 && row->itemsize <= 2 ? 8 * (int64_t)row->width : -1;
    case TABLE_OF_2_BYTES:
    case TABLE_OF_4_BYTES:
        return row->itemsize == 1 ? 256 * (int64_t)restored_itemsize(row) : -1;
    case FLOAT16_TO_FLOAT32:
    case BFLOAT16_TO_FLOAT32:
        return row->itemsize == 2 ? 0 : -1;
    default:
        return -1;
    }
}

static int is_possible(const Plan *plan, const Row *row)
{
    /* Without a shuffle (codec 1), only bytes. */
    int is_deflate = row->codec == 0 || (row->codec == 1 && row->itemsize == 1);
    if (!is_deflate || row->itemsize < 1 || row->itemsize > LARGEST_ITEM)
        return 0;
    if (row->raw_nbytes < 1 || row->raw_nbytes > LARGEST_CHUNK || row->raw_nbytes % row->itemsize)
        return 0;
    if (row->nbytes < LEAST_HASHED || row->nbytes > LARGEST_CHUNK + LARGEST_CHUNK / 64 || row->offset < 0)
        return 0;
    if (plan->descriptor < 0 && !fits(row->offset, row->nbytes, plan->source_nbytes))
        return 0;
    if (!fits(row->first, row->count, (size_t)(row->raw_nbytes / row->itemsize)))
        return 0;
    int64_t size = (int64_t)restored_itemsize(row), needed = table_nbytes(row);
    if (!fits(row->target, row->count * size, plan->arena_nbytes))
        return 0;
    if (row->restoring != AS_STORED && (uintptr_t)(plan->arena + row->target) % (uintptr_t)size)
        return 0;
    if (needed < 0 || !fits(row->table, needed, plan->tables_nbytes))
        return 0;
    return !needed || (uintptr_t)(plan->tables + row->table) % 4 == 0;
}

static int has_room(uint8_t **buffer, size_t *size, size_t needed)
{
    if (needed > *size) {
        free(*buffer);
        *buffer = malloc(needed);
        *size = *buffer ? needed : 0;
    }
    return *buffer != NULL;
}

static const uint8_t *read_stored(const Plan *plan, Slot *slot)
{
    const Row *row = slot->row;
    if (plan->descriptor < 0)
        return plan->source + row->offset;
    if (!has_room(&slot->stored, &slot->stored_nbytes, (size_t)row->nbytes))
        return NULL;
    for (int64_t done = 0; done < row->nbytes;) {
        ssize_t count = pread(plan->descriptor, slot->stored + done, (size_t)(row->nbytes - done),
                              (off_t)(row->offset + done));
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0)
            return NULL;
        done += count;
    }
    return slot->stored;
}

/* Whether inflating has begun. */
static int begin(const Plan *plan, Slot *slot)
{
    const Row *row = slot->row;
    if (!is_possible(plan, row))
        return 0;
    const uint8_t *stored = read_stored(plan, slot);
    if (!stored || (row->is_checked && xxh3_64(stored, (size_t)row->nbytes) != row->checksum))
        return 0;
    uint8_t *out;
    if (row->restoring == AS_STORED && row->itemsize == 1 && row->count == row->raw_nbytes &&
        !plan->keeps_arena) {
        out = plan->arena + row->target;
    } else {
        if (!has_room(&slot->planes, &slot->planes_nbytes, (size_t)row->raw_nbytes))
            return 0;
        out = slot->planes;
    }
    inflate_begin(&slot->inflater, stored, (size_t)row->nbytes, out, (size_t)row->raw_nbytes);
    return 1;
}

static void finish(const Plan *plan, Slot *slot)
{
    const Row *row = slot->row;
    slot->row = NULL;
    if (!inflate_is_whole(&slot->inflater))
        return;
    const uint8_t *planes = slot->inflater.start;
    uint8_t *out = plan->arena + row->target;
    size_t itemsize = (size_t)row->itemsize, num_elements = (size_t)row->raw_nbytes / itemsize;
    size_t first = (size_t)row->first, count = (size_t)row->count;
    const float *table = (const float *)(const void *)(plan->tables + row->table);
    switch (row->restoring) {
    case AS_STORED:
        if (planes != out)
            unshuffle(planes, num_elements, itemsize, first, count, out);
        break;
    case STEPS_TO_FLOAT16:
    case STEPS_TO_FLOAT32:
        restore_steps(planes, num_elements, itemsize, first, count, (size_t)row->width,
                      (float)row->zero_point, table, row->restoring == STEPS_TO_FLOAT16, out);
        break;
    case TABLE_OF_2_BYTES:
    case TABLE_OF_4_BYTES:
        look_up(planes + first, count, plan->tables + row->table, restored_itemsize(row), out);
        break;
    default:
        widen(planes, num_elements, first, count, row->restoring == BFLOAT16_TO_FLOAT32, out);
    }
    plan->done[slot->number] = 1;
}

/* The next row that can be inflated, if any is left. */
static void occupy(Work *work, Slot *slot)
{
    const Plan *plan = work->plan;
    while (!slot->row && (slot->number = take_next(work)) < plan->num_rows) {
        slot->row = plan->rows + slot->number;
        if (!begin(plan, slot))
            slot->row = NULL;
    }
}

#define LARGEST_SPARE (8 << 20)
static Spare spare;

static void free_slots(Slot *slots)
{
    size_t nbytes = 0;
    for (int i = 0; i < NUM_LANES; i++)
        nbytes += slots[i].stored_nbytes + slots[i].planes_nbytes;
    if (nbytes <= LARGEST_SPARE)
        slots = spare_give(spare, slots);
    for (int i = 0; slots && i < NUM_LANES; i++) {
        free(slots[i].stored);
        free(slots[i].planes);
    }
    free(slots);
}

static void *run_rows(void *argument)
{
    Work *work = argument;
    Slot *slots = spare_take(spare);
    if (!slots && !(slots = calloc(NUM_LANES, sizeof *slots)))
        return NULL;
    for (;;) {
        Inflater *streams[NUM_LANES];
        int count = 0;
        for (int i = 0; i < work->num_lanes; i++) {
            occupy(work, slots + i);
            if (slots[i].row)
                streams[count++] = &slots[i].inflater;
        }
        if (!count)
            break;
        inflate_some(streams, count);
        for (int i = 0; i < NUM_LANES; i++)
            if (slots[i].row && slots[i].inflater.state >= FINISHED)
                finish(work->plan, slots + i);
    }
    free_slots(slots);
    return NULL;
}

void plan_run(const Plan *plan, int num_threads)
{
    Work work = {plan, 0, NUM_LANES};
    int64_t total = 0;
    for (size_t i = 0; i < plan->num_rows && total < MOST_THREADS * LEAST_PER_THREAD; i++)
        if (plan->rows[i].raw_nbytes > 0 && plan->rows[i].raw_nbytes <= LARGEST_CHUNK)
            total += plan->rows[i].raw_nbytes;
    int64_t useful = total / LEAST_PER_THREAD;
    int64_t most = num_threads < MOST_THREADS ? num_threads : MOST_THREADS;
    most = useful < most ? useful : most;
    if (most > 1 && plan->num_rows < (size_t)(most * NUM_LANES))
        work.num_lanes = (int)((plan->num_rows + (size_t)most - 1) / (size_t)most);
    pthread_t threads[MOST_THREADS];
    int num_started = 0;
    /* Signals are for the thread that called. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (num_started + 1 < most && !pthread_create(threads + num_started, NULL, run_rows, &work))
        num_started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    run_rows(&work);
    for (int i = 0; i < num_started; i++)
        pthread_join(threads[i], NULL);
}
