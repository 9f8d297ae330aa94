/* The kernels as `h5traces._native`: buffers in, buffers or numbers out, without the interpreter's
 * lock. h5traces/format/native.py loads it. */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

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

static PyObject *hash_of(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*", &data))
        return NULL;
    uint64_t hash;
    Py_BEGIN_ALLOW_THREADS
    hash = xxh3_64(data.buf, (size_t)data.len);
    Py_END_ALLOW_THREADS
    return done_with(&data, 1, PyLong_FromUnsignedLongLong(hash));
}

static PyObject *adler_of(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer data;
    if (!PyArg_ParseTuple(args, "y*", &data))
        return NULL;
    uint32_t sum;
    Py_BEGIN_ALLOW_THREADS
    sum = adler32(data.buf, (size_t)data.len);
    Py_END_ALLOW_THREADS
    return done_with(&data, 1, PyLong_FromUnsignedLong(sum));
}

static PyObject *reorder(PyObject *args, int is_back)
{
    Py_buffer data[2];
    Py_ssize_t itemsize;
    if (!PyArg_ParseTuple(args, "y*w*n", data, data + 1, &itemsize))
        return NULL;
    if (itemsize < 1 || data[0].len != data[1].len)
        return wrong(data, 2, "sizes of the buffers differ, or itemsize is less than 1");
    size_t nbytes = (size_t)data[0].len, size = (size_t)itemsize, whole = nbytes / size * size;
    const uint8_t *in = data[0].buf;
    uint8_t *out = data[1].buf;
    Py_BEGIN_ALLOW_THREADS
    if (is_back) {
        unshuffle(in, nbytes / size, size, 0, nbytes / size, out);
        memcpy(out + whole, in + whole, nbytes - whole);
    } else {
        shuffle(in, out, nbytes, size);
    }
    Py_END_ALLOW_THREADS
    return done_with(data, 2, Py_NewRef(Py_None));
}

static PyObject *shuffle_bytes(PyObject *self, PyObject *args)
{
    (void)self;
    return reorder(args, 0);
}

static PyObject *unshuffle_bytes(PyObject *self, PyObject *args)
{
    (void)self;
    return reorder(args, 1);
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
                 (size_t)data[2].len, data[3].buf,      (size_t)data[3].len, data[4].buf};
    Py_BEGIN_ALLOW_THREADS
    plan_run(&plan, num_threads);
    Py_END_ALLOW_THREADS
    return done_with(data, 5, Py_NewRef(Py_None));
}

static PyMethodDef METHODS[] = {
    {"features", features, METH_NOARGS, "features() -> str\n\nWhat of the processor is used."},
    {"xxh3_64", hash_of, METH_VARARGS, "xxh3_64(data) -> int"},
    {"adler32", adler_of, METH_VARARGS, "adler32(data) -> int"},
    {"shuffle", shuffle_bytes, METH_VARARGS, "shuffle(raw, out, itemsize)"},
    {"unshuffle", unshuffle_bytes, METH_VARARGS, "unshuffle(shuffled, out, itemsize)"},
    {"run_plan", run_plan, METH_VARARGS,
     "run_plan(descriptor, source, plan, arena, tables, done, threads)\n\n"
     "Restore rows of a plan; `done` has a byte for each, 1 where it was restored."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "h5traces._native", NULL, -1, METHODS,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void)
{
    kernels_init();
    return PyModule_Create(&MODULE);
}
