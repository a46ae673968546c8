/* What the files of the compiled variant share: arguments that are buffers, and words at any address.
 *
 * A function that takes several buffers gives back those it has when another is refused: an exported buffer keeps its
 * owner from growing.
 */
#ifndef VFIO_MODEL_COMPILED_H
#define VFIO_MODEL_COMPILED_H

#include <Python.h>
#include <stdint.h>
#include <string.h>

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, NULL}

/* The functions of _compiled_maps.c and _compiled_walks.c, ended by one without a name. */
extern PyMethodDef map_functions[], walk_functions[];

static inline int refuse(const char *name, const char *what)
{
    PyErr_Format(PyExc_ValueError, "%s: %s", name, what);
    return -1;
}

/* A contiguous buffer, or BufferError (TypeError for what is no buffer at all) that names the argument. */
static inline int take(PyObject *object, Py_buffer *view, int flags, const char *name)
{
    if (PyObject_GetBuffer(object, view, flags) == 0)
        return 0;
    if (PyErr_ExceptionMatches(PyExc_BufferError) || PyErr_ExceptionMatches(PyExc_ValueError)) {
        PyErr_Clear();
        PyErr_Format(PyExc_BufferError, "%s: a contiguous%s buffer is needed", name,
                     flags & PyBUF_WRITABLE ? ", writable" : "");
    }
    return -1;
}

/* A contiguous buffer of native u64, at any address: see word() and put(). */
static inline int take_words(PyObject *object, Py_buffer *view, int flags, const char *name)
{
    const char *format;

    if (take(object, view, flags | PyBUF_C_CONTIGUOUS | PyBUF_FORMAT, name))
        return -1;
    format = view->format ? view->format : "B";
    if (*format == '@' || *format == '=')
        format++;
    if (view->itemsize == 8 && (!strcmp(format, "Q") || !strcmp(format, "L")))
        return 0;
    PyBuffer_Release(view);
    return refuse(name, "unsigned words of 8 bytes are needed");
}

static inline uint64_t word(const void *words, uint64_t index)
{
    uint64_t value;

    memcpy(&value, (const char *)words + index * 8, 8);
    return value;
}

static inline void put(void *words, uint64_t index, uint64_t value)
{
    memcpy((char *)words + index * 8, &value, 8);
}

static inline int take_u64(PyObject *object, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(object);
    return *value == UINT64_MAX && PyErr_Occurred() ? -1 : 0;
}

#endif
