/* The kernels as `h5traces._native`: buffers in, buffers or numbers out, without the interpreter's
 * lock. h5traces/format/native.py loads it. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "kernels.h"

/* Buffers of a call, which are let go together. */
static PyObject *done_with(Py_buffer *buffers, int count, PyObject *result)
{
    for (int i = 0; i < count; i++)
        PyBuffer_Release(buffers + i);
    return result;
}

static PyObject *wrong(Py_buffer *buffers, int count, const char *message)
{
    PyErr_SetString(PyExc_ValueError, message);
    return done_with(buffers, count, NULL);
}

static PyObject *features(PyObject *self, PyObject *args)
{
    (void)self, (void)args;
#if defined(__aarch64__) && defined(__ARM_NEON)
    return PyUnicode_FromString("NEON");
#else
    return PyUnicode_FromString(kernels_wide ? "AVX2" : "plain C");
#endif
}

/* What `store` does with one array or chunk. */
typedef struct {
    Py_buffer data;
    const char *head;
    Py_ssize_t itemsize, head_nbytes;
    int kind, has_digest, comes_back;
    uint8_t *out, digest[16];
    size_t size, special[2];
    uint64_t checksum;
} Stored;

/* Bytes that have room for a chunk; 0 for what Python should encode. */
static Py_ssize_t room_for(const Stored *one)
{
    if (one->itemsize < 1 || one->itemsize > LARGEST_ITEM || one->data.len < 1 || one->data.len > LARGEST_CHUNK)
        return 0;
    return (Py_ssize_t)encode_bound((size_t)one->data.len, (size_t)one->itemsize);
}

static void store_one(Stored *one, Encoder *encoder)
{
    size_t nbytes = (size_t)one->data.len, head_nbytes = (size_t)one->head_nbytes;
    if (one->kind >= 0)
        count_special(one->data.buf, nbytes / (one->kind == FLOAT32 ? 4 : 2), one->kind, one->special);
    one->has_digest = head_nbytes && head_nbytes <= LARGEST_HEAD && head_nbytes + nbytes >= LEAST_DIGESTED;
    if (one->has_digest)
        xxh3_128((const uint8_t *)one->head, head_nbytes, one->data.buf, nbytes, one->digest);
    if (one->out && encoder)
        one->size = encode_chunk(encoder, one->data.buf, nbytes, (size_t)one->itemsize, one->out);
    if (one->size)
        one->checksum = xxh3_64(one->out, one->size);
}

/* Where arrays are decoded; kept for the next call. */
typedef struct {
    size_t size;
    uint8_t bytes[];
} Arena;
#define LARGEST_ARENA (8 << 20)
static Spare arenas;

static Arena *arena_of(Arena *arena, size_t size)
{
    if (arena && arena->size >= size)
        return arena;
    free(arena);
    if ((arena = malloc(sizeof *arena + size)))
        arena->size = size;
    return arena;
}

/* Decode up to NUM_LANES arrays that were just encoded, while the processor's cache has them, and compare
 * them with what they were. */
static Arena *look_back(Stored **ones, size_t count, Arena *arena)
{
    Row rows[NUM_LANES] = {{0}};
    uint8_t done[NUM_LANES] = {0};
    size_t nbytes = 0, end = 0;
    const uint8_t *source = ones[0]->out;
    for (size_t i = 1; i < count; i++)
        source = ones[i]->out < source ? ones[i]->out : source;
    for (size_t i = 0; i < count; i++) {
        const Stored *one = ones[i];
        size_t offset = (size_t)(one->out - source);
        rows[i] = (Row){.offset = (int64_t)offset, .nbytes = (int64_t)one->size, .raw_nbytes = one->data.len,
                        .count = one->data.len / one->itemsize, .itemsize = (int32_t)one->itemsize,
                        .target = (int64_t)nbytes};
        end = offset + one->size > end ? offset + one->size : end;
        nbytes += (size_t)one->data.len;
    }
    if (!(arena = arena_of(arena, nbytes)))
        return NULL;
    Plan plan = {.descriptor = -1, .source = source, .source_nbytes = end, .rows = rows, .num_rows = count,
                 .arena = arena->bytes, .arena_nbytes = nbytes, .done = done};
    plan_run(&plan, 1);
    for (size_t i = 0; i < count; i++)
        if (done[i])
            ones[i]->comes_back =
                !memcmp(arena->bytes + rows[i].target, ones[i]->data.buf, (size_t)ones[i]->data.len);
    return arena;
}

static void store_all(Stored *all, size_t count, int looks_back)
{
    Encoder *encoder = encoder_new();
    Arena *arena = looks_back ? spare_take(arenas) : NULL;
    Stored *waiting[NUM_LANES];
    size_t num_waiting = 0;
    for (size_t i = 0; i < count; i++) {
        store_one(all + i, encoder);
        if (looks_back && all[i].size)
            waiting[num_waiting++] = all + i;
        if (num_waiting == NUM_LANES || (num_waiting && i + 1 == count)) {
            arena = look_back(waiting, num_waiting, arena);
            num_waiting = 0;
        }
    }
    free(arena && arena->size <= LARGEST_ARENA ? spare_give(arenas, arena) : arena);
    encoder_free(encoder);
}

static PyObject *store(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *given, *results = NULL, *bytes = NULL;
    int looks_back = 0;
    if (!PyArg_ParseTuple(args, "O!|p", &PyTuple_Type, &given, &looks_back))
        return NULL;
    Py_ssize_t count = PyTuple_Size(given), held = 0, room;
    Stored *all = calloc((size_t)count + 1, sizeof *all), *one;
    if (!all || !(results = PyList_New(count)))
        goto end;
    for (; held < count; held++) {
        one = all + held;
        if (!PyArg_ParseTuple(PyTuple_GetItem(given, held), "y*ny#i", &one->data, &one->itemsize,
                              &one->head, &one->head_nbytes, &one->kind))
            goto end;
        bytes = (room = room_for(one)) ? PyByteArray_FromStringAndSize(NULL, room)
                                       : Py_NewRef(Py_None);
        if (!bytes || one->kind >= NUM_FLOAT_KINDS) {
            Py_XDECREF(bytes);
            PyBuffer_Release(&one->data);
            PyErr_SetString(PyExc_ValueError, "the kind of float is unknown, or there is no memory");
            goto end;
        }
        one->comes_back = -1;
        one->out = room ? (uint8_t *)PyByteArray_AsString(bytes) : NULL;
        PyList_SetItem(results, held, bytes);
    }
    Py_BEGIN_ALLOW_THREADS
    store_all(all, (size_t)count, looks_back);
    Py_END_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++) {
        one = all + i;
        bytes = Py_NewRef(one->size ? PyList_GetItem(results, i) : Py_None);
        PyList_SetItem(results, i, Py_NewRef(Py_None));
        if (one->size && PyByteArray_Resize(bytes, (Py_ssize_t)one->size) < 0) {
            Py_DECREF(bytes);
            goto end;
        }
        PyObject *digest = one->has_digest ? PyBytes_FromStringAndSize((char *)one->digest, 16)
                                           : Py_NewRef(Py_None);
        PyList_SetItem(results, i, Py_BuildValue("NKNnni", bytes, (unsigned long long)one->checksum,
                                                 digest, (Py_ssize_t)one->special[0],
                                                 (Py_ssize_t)one->special[1], one->comes_back));
    }
end:
    for (Py_ssize_t i = 0; i < held; i++)
        PyBuffer_Release(&all[i].data);
    free(all);
    if (PyErr_Occurred() || !results) {
        Py_XDECREF(results);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    return results;
}

static PyObject *checksums(PyObject *self, PyObject *args)
{
    (void)self;
    PyObject *given;
    if (!PyArg_ParseTuple(args, "O!", &PyList_Type, &given))
        return NULL;
    Py_ssize_t count = PyList_Size(given), nbytes;
    PyObject *results = PyList_New(count);
    for (Py_ssize_t i = 0; results && i < count; i++) {
        char *data;
        if (PyBytes_AsStringAndSize(PyList_GetItem(given, i), &data, &nbytes) < 0) {
            Py_DECREF(results);
            return NULL;
        }
        PyList_SetItem(results, i, PyLong_FromUnsignedLong(lookup3((uint8_t *)data, (size_t)nbytes)));
    }
    return results;
}

static PyObject *decode(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data[2];
    Py_ssize_t itemsize;
    if (!PyArg_ParseTuple(args, "y*w*n", data, data + 1, &itemsize))
        return NULL;
    uint8_t done = 0;
    if (itemsize >= 1 && itemsize <= LARGEST_ITEM) {
        Row row = {.nbytes = data[0].len, .raw_nbytes = data[1].len, .itemsize = (int32_t)itemsize};
        row.count = row.raw_nbytes / itemsize;
        Plan plan = {.descriptor = -1, .source = data[0].buf, .source_nbytes = (size_t)data[0].len,
                     .rows = &row, .num_rows = 1, .done = &done, .keeps_arena = 1,
                     .arena = data[1].buf, .arena_nbytes = (size_t)data[1].len};
        Py_BEGIN_ALLOW_THREADS
        plan_run(&plan, 1);
        Py_END_ALLOW_THREADS
    }
    return done_with(data, 2, PyBool_FromLong(done));
}

static PyObject *cast(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data[2];
    int from, to;
    if (!PyArg_ParseTuple(args, "y*iw*i", data, &from, data + 1, &to))
        return NULL;
    if (from < 0 || from >= NUM_FLOAT_KINDS || to < 0 || to >= NUM_FLOAT_KINDS)
        return wrong(data, 2, "the kind of float is unknown");
    size_t count = (size_t)data[0].len / (from == FLOAT32 ? 4 : 2), counts[6] = {0};
    if ((size_t)data[1].len != count * (to == FLOAT32 ? 4 : 2))
        return wrong(data, 2, "the buffers hold different numbers of values");
    Py_BEGIN_ALLOW_THREADS
    count_special(data[0].buf, count, from, counts);
    if (!counts[0])
        cast_counted(data[0].buf, (enum float_kind)from, data[1].buf, (enum float_kind)to, count,
                     counts + 2);
    Py_END_ALLOW_THREADS
    return done_with(data, 2, Py_BuildValue("nnnnnn", (Py_ssize_t)counts[0], (Py_ssize_t)counts[1],
                                            (Py_ssize_t)counts[2], (Py_ssize_t)counts[3],
                                            (Py_ssize_t)counts[4], (Py_ssize_t)counts[5]));
}

static PyObject *to_steps(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data[4]; /* values, scale of five rows, out, beyond */
    int from, itemsize;
    unsigned spacing, zero_point;
    float most_steps;
    if (!PyArg_ParseTuple(args, "y*iy*fIIw*iw*", data, &from, data + 1, &most_steps, &spacing, &zero_point,
                          data + 2, &itemsize, data + 3))
        return NULL;
    size_t width = (size_t)data[1].len / 20;
    if ((from != FLOAT16 && from != FLOAT32) || (itemsize != 1 && itemsize != 2) || !width)
        return wrong(data, 4, "the kind of float, the itemsize or the width is impossible");
    size_t count = (size_t)data[0].len / (from == FLOAT32 ? 4 : 2);
    if ((size_t)data[2].len != count * (size_t)itemsize || (uintptr_t)data[1].buf % 4 ||
        (uintptr_t)data[3].buf % 8)
        return wrong(data, 4, "the buffers hold different numbers of values, or are not aligned");
    const float *rows = data[1].buf;
    StepScale scale = {rows, rows + width, rows + 2 * width, rows + 3 * width, rows + 4 * width,
                       width, most_steps, spacing, zero_point};
    int64_t found;
    Py_BEGIN_ALLOW_THREADS
    found = numbers_of_values(data[0].buf, (enum float_kind)from, count, &scale, data[2].buf,
                              (size_t)itemsize, data[3].buf, (size_t)data[3].len / 8);
    Py_END_ALLOW_THREADS
    return done_with(data, 4, PyLong_FromLongLong(found));
}

static PyObject *from_steps(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data[3]; /* numbers, factor and offset of channels, out */
    int itemsize, zero_point, as_half;
    if (!PyArg_ParseTuple(args, "y*iy*iiw*", data, &itemsize, data + 1, &zero_point, &as_half, data + 2))
        return NULL;
    size_t width = (size_t)data[1].len / 8, size = as_half ? 2 : 4;
    if ((itemsize != 1 && itemsize != 2) || !width)
        return wrong(data, 3, "the itemsize or the width is impossible");
    size_t count = (size_t)(data[0].len / itemsize);
    if ((size_t)data[2].len != count * size || (uintptr_t)data[1].buf % 4 || (uintptr_t)data[2].buf % size)
        return wrong(data, 3, "the buffers hold different numbers of values, or are not aligned");
    Py_BEGIN_ALLOW_THREADS
    restore_interleaved(data[0].buf, (size_t)itemsize, count, width, (float)zero_point, data[1].buf,
                        as_half, data[2].buf);
    Py_END_ALLOW_THREADS
    return done_with(data, 3, Py_NewRef(Py_None));
}

static PyObject *to_levels(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data[3]; /* bits, table, out */
    if (!PyArg_ParseTuple(args, "y*y*w*", data, data + 1, data + 2))
        return NULL;
    size_t count = (size_t)data[0].len / 2, size = (size_t)data[1].len >> 16;
    if ((data[1].len != 1 << 16 && data[1].len != 2 << 16) || (size_t)data[2].len != size * count)
        return wrong(data, 3, "the buffers hold different numbers of values, or the table is short");
    uint32_t largest = 0;
    Py_BEGIN_ALLOW_THREADS
    levels_of(data[0].buf, count, data[1].buf, size, data[2].buf, &largest);
    Py_END_ALLOW_THREADS
    return done_with(data, 3, PyLong_FromUnsignedLong(largest));
}

static PyObject *take_rows(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data[3]; /* rows, table of 256, out */
    if (!PyArg_ParseTuple(args, "y*y*w*", data, data + 1, data + 2))
        return NULL;
    size_t size = (size_t)data[1].len / 256, count = (size_t)data[0].len;
    if ((size != 2 && size != 4) || data[1].len % 256 || (size_t)data[2].len != count * size)
        return wrong(data, 3, "the buffers hold different numbers of values, or the table is wrong");
    Py_BEGIN_ALLOW_THREADS
    look_up(data[0].buf, count, data[1].buf, size, data[2].buf);
    Py_END_ALLOW_THREADS
    return done_with(data, 3, Py_NewRef(Py_None));
}

static PyObject *run_plan(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data[5]; /* source, rows, arena, tables, done */
    int descriptor, num_threads;
    if (!PyArg_ParseTuple(args, "iy*y*w*y*w*i", &descriptor, data, data + 1, data + 2, data + 3,
                          data + 4, &num_threads))
        return NULL;
    size_t num_rows = (size_t)data[4].len;
    if ((size_t)data[1].len != num_rows * sizeof(Row) || (uintptr_t)data[1].buf % 8)
        return wrong(data, 5, "the plan is not of as many rows as `done`, or not aligned");
    Plan plan = {descriptor,       data[0].buf,         (size_t)data[0].len,
                 data[1].buf,      num_rows,            data[2].buf,
                 (size_t)data[2].len, data[3].buf,      (size_t)data[3].len, data[4].buf, 0};
    Py_BEGIN_ALLOW_THREADS
    plan_run(&plan, num_threads);
    Py_END_ALLOW_THREADS
    return done_with(data, 5, Py_NewRef(Py_None));
}

static PyMethodDef METHODS[] = {
    {"features", features, METH_NOARGS, "features() -> str\n\nWhat of the processor is used."},
    {"store", store, METH_VARARGS,
     "store(((values, itemsize, head, kind), ...), looks_back=0)\n"
     "-> [(stored, checksum, digest, nan, inf, comes_back), ...]\n\n"
     "`stored` is a zlib stream of the shuffled bytes, None where Python should encode or `itemsize` is\n"
     "0; `digest` is xxh3-128 of `head` and `values`, None where they are short or there is no head.\n"
     "Values that are not finite are counted for kinds 0 (float16), 1 (bfloat16) and 2 (float32).\n"
     "With `looks_back`, what was stored is decoded: 1 if that gives the values, 0 if not, -1 if unknown."},
    {"lookup3", checksums, METH_VARARGS, "lookup3([bytes, ...]) -> [int, ...]\n\nHDF5's checksums."},
    {"decode", decode, METH_VARARGS,
     "decode(stored, out, itemsize) -> bool\n\nWhether a zlib stream of shuffled bytes fills `out`."},
    {"cast", cast, METH_VARARGS,
     "cast(values, kind, out, kind) -> (nan, inf, overflow, to_zero, to_subnormal, changed)\n\n"
     "Kinds are those of `store`. With NaN among the values, nothing is cast, and the other counts say nothing."},
    {"to_steps", to_steps, METH_VARARGS,
     "to_steps(values, kind, scale, most_steps, spacing, zero_point, out, itemsize, beyond)\n\n"
     "How many do not come back, -1 if too many. `scale`: step, 1 / step, offset, limit, bound."},
    {"from_steps", from_steps, METH_VARARGS,
     "from_steps(stored, itemsize, table, zero_point, as_half, out)"},
    {"to_levels", to_levels, METH_VARARGS, "to_levels(bits, table, out) -> int\n\nThe largest bits. Of one or two bytes."},
    {"take", take_rows, METH_VARARGS, "take(rows, table, out)\n\nRows of a table of 256."},
    {"run_plan", run_plan, METH_VARARGS,
     "run_plan(descriptor, source, plan, arena, tables, done, threads)\n\n"
     "Restore rows of a plan; `done` has a byte for each, 1 where it was restored."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "h5traces._native", NULL, -1, METHODS,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
    const char *chosen = getenv("H5TRACES_KERNELS");
    kernels_init(!chosen || strcmp(chosen, "plain"));
    encode_init();
    PyObject *module = PyModule_Create(&MODULE);
    if (module && PyModule_AddIntConstant(module, "REVISION", KERNELS_REVISION) < 0) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
