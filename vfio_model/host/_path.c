/* The fast half of the assigned path (vfio_model/host/dma.py), in one call: lane odd, state and root, TCE, copy, lane even.
 *
 * A Path serves an access inside one page of the window and the segment that know() told it of. Whatever
 * is not plainly good goes to the slow half, a Python callable, which finds the fault or moves the bytes, and may call
 * know() anew. The layout of the shared words is that of vfio_model/host/layout.py and vfio_model/memory/lane.py.
 *
 * What must not be broken: what vfio_model/memory/_lane.h says of a section. Addresses are u64 and wrap; every test is
 * one that cannot overflow.
 */
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "../memory/_lane.h"

#define STATE 8
#define BUS_MASTER 9
#define DIRTY 13
#define PERM 3u
#define LEAF 4u
#define FIRST_HPA (UINT64_C(1) << 32)
#define DIRTY_SHIFT 12
#define MAY_READ 1u
#define MAY_WRITE 2u

typedef struct {
    PyObject_HEAD
    PyObject *slow_read, *slow_write, *ok;
    Py_buffer pe_buffer, lane_buffer, dirty_buffer, tces_buffer, ram_buffer;
    int bound, noted, knows; /* which buffers are held: the first pair, the third, the last pair */
    const uint64_t *pe, *tces;
    uint64_t *counter;
    char *ram;
    uint8_t *dirty;
    uint64_t dirty_size;
    uint64_t root_word, record, start, shift, low, base, entries, room;
    /* Of a window with several levels, whose `tces` are all words of the domain. */
    uint64_t words, table;
    unsigned levels, level_shift;
} Path;

/* The entry of page `index` in a table of several levels, as it is now; 0 where there is none. Under a leaf of a higher
 * level it is what a page of the window's size would have. */
static uint64_t walk(const Path *p, uint64_t index)
{
    const uint64_t mask = (UINT64_C(1) << p->level_shift) - 1;
    uint64_t table = p->table;

    for (unsigned level = p->levels - 1;; level--) {
        const unsigned below = p->level_shift * level;
        const uint64_t at = table + (index >> below & mask);
        uint64_t entry;
        if (at >= p->words)
            return 0;
        entry = load(p->tces + at);
        if (!level || !entry)
            return entry;
        if (entry & LEAF)
            return (entry & ~(uint64_t)LEAF) | (index & ((UINT64_C(1) << below) - 1)) << p->shift;
        table = (entry & ~(uint64_t)PERM) >> 3;
    }
}

/* After the copy, before the lane is even: the pages that were written, so that they are copied again. */
static void note(const Path *p, uint64_t hpa, uint64_t size)
{
    uint64_t page = (hpa - FIRST_HPA) >> DIRTY_SHIFT, last = (hpa + size - 1 - FIRST_HPA) >> DIRTY_SHIFT;

    for (; page <= last && page < p->dirty_size; page++)
        __atomic_store_n(p->dirty + page, 1, __ATOMIC_RELEASE);
}

/* One DMA section. Returns whether all of the access was done; else nothing was. */
static int section(const Path *p, uint64_t iova, void *bytes, uint64_t size, int to_ram)
{
    const uint64_t within = iova & p->low, index = (iova - p->start) >> p->shift, count = load(p->counter);
    int moved = 0;

    if (size > SECTION_BYTES || size > p->low + 1 - within || index >= p->entries)
        return 0;
    begin_section(p->counter, count);
    if (load(p->pe + p->root_word) == p->record && !load(p->pe + STATE) && load(p->pe + BUS_MASTER)) {
        uint64_t tce = p->levels == 1 ? load(p->tces + index) : walk(p, index);
        uint64_t at = (tce & ~p->low) - p->base + within;
        if (tce & (to_ram ? MAY_WRITE : MAY_READ) && at <= p->room && size <= p->room - at) {
            if (!to_ram) {
                memmove(bytes, p->ram + at, size);
            } else {
                memmove(p->ram + at, bytes, size);
                if (load(p->pe + DIRTY) && size)
                    note(p, p->base + at, size);
            }
            moved = 1;
        }
    }
    end_section(p->counter, count);
    return moved;
}

static PyObject *move(Path *p, PyObject *const *args, Py_ssize_t nargs, int to_ram)
{
    Py_buffer bytes;
    uint64_t iova;
    int moved;

    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "%s takes an iova and a buffer", to_ram ? "write" : "read");
    iova = PyLong_AsUnsignedLongLong(args[0]);
    if ((iova == UINT64_MAX && PyErr_Occurred()) ||
        PyObject_GetBuffer(args[1], &bytes, to_ram ? PyBUF_SIMPLE : PyBUF_WRITABLE)) {
        PyErr_Clear(); /* the slow half knows what to say of it */
    } else {
        moved = p->knows && section(p, iova, bytes.buf, (uint64_t)bytes.len, to_ram);
        PyBuffer_Release(&bytes);
        if (moved)
            return Py_NewRef(p->ok);
    }
    return PyObject_CallFunctionObjArgs(to_ram ? p->slow_write : p->slow_read, args[0], args[1], NULL);
}

static PyObject *path_read(Path *p, PyObject *const *args, Py_ssize_t nargs)
{
    return move(p, args, nargs, 0);
}

static PyObject *path_write(Path *p, PyObject *const *args, Py_ssize_t nargs)
{
    return move(p, args, nargs, 1);
}

/* many(iovas, size, pieces, first, to_ram): each piece in a section of its own, in order, from the first one on. Returns
 * how many went before one that is not plainly good. */
static PyObject *path_many(Path *p, PyObject *const *args, Py_ssize_t nargs)
{
    Py_buffer iovas, pieces;
    PyObject *result = NULL;
    unsigned long long size, first;
    int to_ram;

    if (nargs != 5)
        return PyErr_Format(PyExc_TypeError, "many takes iovas, size, pieces, first, to_ram");
    size = PyLong_AsUnsignedLongLong(args[1]);
    first = PyLong_AsUnsignedLongLong(args[3]);
    to_ram = PyObject_IsTrue(args[4]);
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &iovas, PyBUF_SIMPLE))
        return NULL;
    if (!PyObject_GetBuffer(args[2], &pieces, to_ram ? PyBUF_SIMPLE : PyBUF_WRITABLE)) {
        const uint64_t total = (uint64_t)iovas.len / 8;
        if (!size || total > (uint64_t)pieces.len / size) {
            PyErr_Format(PyExc_ValueError, "%llu bytes for each address do not make the pieces", size);
        } else {
            uint64_t at = first, iova;
            for (; p->knows && at < total; at++) {
                memcpy(&iova, (char *)iovas.buf + at * 8, 8);
                if (!section(p, iova, (char *)pieces.buf + at * size, size, to_ram))
                    break;
            }
            result = PyLong_FromUnsignedLongLong(at > first ? at - first : 0);
        }
        PyBuffer_Release(&pieces);
    }
    PyBuffer_Release(&iovas);
    return result;
}

static void drop(Path *p)
{
    if (!p->knows)
        return;
    p->knows = 0;
    PyBuffer_Release(&p->tces_buffer);
    PyBuffer_Release(&p->ram_buffer);
}

static PyObject *path_forget(Path *p, PyObject *unused)
{
    (void)unused;
    drop(p);
    return Py_BuildValue("");
}

static PyObject *path_know(Path *p, PyObject *args)
{
    unsigned long long root_word, record, start, shift, base, entries = 0, table = 0;
    unsigned levels = 1, level_shift = 0;
    PyObject *tces, *ram;

    if (!PyArg_ParseTuple(args, "KKKKKOO|(IIKK)", &root_word, &record, &start, &shift, &base, &tces, &ram, &levels,
                          &level_shift, &table, &entries))
        return NULL;
    drop(p);
    if (root_word >= (uint64_t)p->pe_buffer.len / 8 || shift < 2 || shift > 63)
        return PyErr_Format(PyExc_ValueError, "root word %llu, page shift %llu", root_word, shift);
    if (levels < 1 || (levels > 1 && (level_shift < 1 || level_shift > 62 || level_shift * (levels - 1) > 62)))
        return PyErr_Format(PyExc_ValueError, "%u levels of %u bits", levels, level_shift);
    if (PyObject_GetBuffer(tces, &p->tces_buffer, PyBUF_SIMPLE))
        return NULL;
    if (PyObject_GetBuffer(ram, &p->ram_buffer, PyBUF_WRITABLE)) {
        PyBuffer_Release(&p->tces_buffer);
        return NULL;
    }
    p->knows = 1;
    if (p->tces_buffer.len && (uintptr_t)p->tces_buffer.buf & 7) {
        drop(p);
        return PyErr_Format(PyExc_ValueError, "the table is not aligned");
    }
    p->root_word = root_word, p->record = record, p->start = start, p->shift = shift, p->base = base;
    p->low = (UINT64_C(1) << shift) - 1;
    p->tces = p->tces_buffer.buf, p->words = (uint64_t)p->tces_buffer.len / 8;
    p->levels = levels, p->level_shift = level_shift, p->table = table;
    p->entries = levels == 1 ? p->words : entries;
    p->ram = p->ram_buffer.buf, p->room = (uint64_t)p->ram_buffer.len;
    return Py_BuildValue("");
}

static int path_traverse(Path *p, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)p));
    Py_VISIT(p->slow_read);
    Py_VISIT(p->slow_write);
    Py_VISIT(p->ok);
    return 0;
}

static int path_clear(Path *p)
{
    drop(p);
    Py_CLEAR(p->slow_read);
    Py_CLEAR(p->slow_write);
    Py_CLEAR(p->ok);
    return 0;
}

static void path_dealloc(Path *p)
{
    PyTypeObject *type = Py_TYPE((PyObject *)p);

    PyObject_GC_UnTrack(p);
    path_clear(p);
    if (p->bound) {
        PyBuffer_Release(&p->pe_buffer);
        PyBuffer_Release(&p->lane_buffer);
    }
    if (p->noted)
        PyBuffer_Release(&p->dirty_buffer);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(p);
    Py_DECREF(type);
}

/* Takes the PE's words, the lanes' and the dirty map, which may be None, for as long as the object lives. */
static int bind(Path *p, PyObject *pe, PyObject *lanes, unsigned long long slot, PyObject *dirty)
{
    if (dirty != Py_None) {
        if (PyObject_GetBuffer(dirty, &p->dirty_buffer, PyBUF_WRITABLE))
            return -1;
        p->noted = 1;
        p->dirty = p->dirty_buffer.buf, p->dirty_size = (uint64_t)p->dirty_buffer.len;
    }
    if (PyObject_GetBuffer(pe, &p->pe_buffer, PyBUF_SIMPLE))
        return -1;
    if (PyObject_GetBuffer(lanes, &p->lane_buffer, PyBUF_WRITABLE)) {
        PyBuffer_Release(&p->pe_buffer);
        return -1;
    }
    p->bound = 1;
    if (p->pe_buffer.len / 8 <= DIRTY || slot >= (uint64_t)p->lane_buffer.len / 8 ||
        ((uintptr_t)p->pe_buffer.buf | (uintptr_t)p->lane_buffer.buf) & 7) {
        PyErr_Format(PyExc_ValueError, "PE words or lane words too short or not aligned");
        return -1;
    }
    p->pe = p->pe_buffer.buf;
    p->counter = (uint64_t *)p->lane_buffer.buf + slot;
    return 0;
}

static PyObject *path_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *pe, *lanes, *slow_read, *slow_write, *ok, *dirty = Py_None;
    unsigned long long slot;
    Path *p;

    if (kwargs && PyDict_Size(kwargs))
        return PyErr_Format(PyExc_TypeError, "Path takes positional arguments only");
    if (!PyArg_ParseTuple(args, "OOKOOO|O", &pe, &lanes, &slot, &slow_read, &slow_write, &ok, &dirty))
        return NULL;
    p = (Path *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!p)
        return NULL;
    p->slow_read = Py_NewRef(slow_read);
    p->slow_write = Py_NewRef(slow_write);
    p->ok = Py_NewRef(ok);
    if (bind(p, pe, lanes, slot, dirty)) {
        Py_DECREF((PyObject *)p);
        return NULL;
    }
    return (PyObject *)p;
}

#define FAST(name) {#name, (PyCFunction)(void (*)(void))path_##name, METH_FASTCALL, NULL}

static PyMethodDef path_methods[] = {
    FAST(read),
    FAST(write),
    FAST(many),
    {"know", (PyCFunction)(void (*)(void))path_know, METH_VARARGS, NULL},
    {"forget", (PyCFunction)(void (*)(void))path_forget, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot path_slots[] = {
    {Py_tp_new, (void *)path_new},           {Py_tp_dealloc, (void *)path_dealloc}, {Py_tp_methods, path_methods},
    {Py_tp_traverse, (void *)path_traverse}, {Py_tp_clear, (void *)path_clear},     {0, NULL},
};

static PyType_Spec path_spec = {
    "vfio_model.host._path.Path", sizeof(Path), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, path_slots,
};

static int add_type(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&path_spec);

    if (!type)
        return -1;
    if (PyModule_AddObjectRef(module, "Path", type)) {
        Py_DECREF(type);
        return -1;
    }
    Py_DECREF(type);
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_type}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "vfio_model.host._path", "See _path.pyi.", 0, NULL, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__path(void)
{
    return PyModuleDef_Init(&definition);
}
