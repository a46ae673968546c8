/* Hits of an address translation cache (vfio_model/memory/atc_cache.py) in one call: lane odd, ring head and gate, the
 * page's entry, copy, lane even.
 *
 * A Front is what entries are found by: a table by page that takes the place of a dict. A Path serves an access inside
 * one entry that a Front holds. Whatever is not plainly a hit goes to the slow half, a Python callable, which catches up
 * with the ring, finds out what is wrong, or asks for a translation.
 *
 * What must not be broken: what _lane.h says of a section; the head is compared inside it, before an entry is looked
 * for. A Front holds the buffer of each entry as long as it has the entry. Addresses are u64 and wrap; every test is one
 * that cannot overflow.
 */
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include "_lane.h"

#define PAGE_SHIFT 12
#define HEAD 8
#define SMALLEST 64 /* places of a table; a power of two */

typedef struct {
    PyObject *hit;
    Py_buffer bytes;
} Held;

/* `size` is 0 where the bytes cannot be used as the table is to be. */
typedef struct {
    uint64_t page, start, size;
    char *bytes;
    Held *held; /* NULL: a free place */
} Place;

/* Open addressing: an entry lies at its page's first place, or behind it with no free place between. */
typedef struct {
    PyObject_HEAD
    Place *places;
    size_t mask, used;
    int writable;
} Front;

static PyTypeObject *front_type;

static inline size_t first_place(const Front *front, uint64_t page)
{
    return (size_t)(page * UINT64_C(0x9e3779b97f4a7c15) >> 32) & front->mask;
}

static inline Place *find(const Front *front, uint64_t page)
{
    if (!front->used)
        return NULL;
    for (size_t at = first_place(front, page);; at = (at + 1) & front->mask) {
        Place *place = front->places + at;
        if (!place->held || place->page == page)
            return place->held ? place : NULL;
    }
}

static void release(Held *held)
{
    PyBuffer_Release(&held->bytes);
    Py_DECREF(held->hit);
    PyMem_Free(held);
}

static void put(Front *front, const Place *new)
{
    size_t at = first_place(front, new->page);

    while (front->places[at].held)
        at = (at + 1) & front->mask;
    front->places[at] = *new;
    front->used++;
}

static int grow(Front *front)
{
    const size_t before = front->places ? front->mask + 1 : 0, size = before ? before * 2 : SMALLEST;
    Place *old = front->places, *places;

    if (before && front->used < before / 2)
        return 0;
    places = PyMem_Calloc(size, sizeof(Place));
    if (!places) {
        PyErr_NoMemory();
        return -1;
    }
    front->places = places, front->mask = size - 1, front->used = 0;
    for (size_t at = 0; at < before; at++)
        if (old[at].held)
            put(front, old + at);
    PyMem_Free(old);
    return 0;
}

/* Take the entry out; what lies behind it moves up, so that it is still found. */
static Held *take_out(Front *front, Place *place)
{
    Held *held = place->held;
    size_t hole = (size_t)(place - front->places), at = hole;

    for (;;) {
        at = (at + 1) & front->mask;
        if (!front->places[at].held)
            break;
        if (((at - first_place(front, front->places[at].page)) & front->mask) >= ((at - hole) & front->mask)) {
            front->places[hole] = front->places[at];
            hole = at;
        }
    }
    front->places[hole].held = NULL;
    front->used--;
    return held;
}

static void empty(Front *front)
{
    Place *places = front->places;
    const size_t count = places ? front->mask + 1 : 0;

    front->places = NULL;
    front->mask = front->used = 0;
    for (size_t at = 0; at < count; at++)
        if (places[at].held)
            release(places[at].held);
    PyMem_Free(places);
}

static int page_of(PyObject *object, uint64_t *page)
{
    *page = PyLong_AsUnsignedLongLong(object);
    return *page == UINT64_MAX && PyErr_Occurred() ? -1 : 0;
}

static PyObject *front_get(Front *front, PyObject *object)
{
    uint64_t page;
    Place *place;

    if (page_of(object, &page))
        return NULL;
    place = find(front, page);
    return place ? Py_NewRef(place->held->hit) : Py_BuildValue("");
}

static int front_set(Front *front, PyObject *object, PyObject *hit)
{
    Place new, *old;
    Held *held;

    if (page_of(object, &new.page))
        return -1;
    if (!hit || !PyTuple_Check(hit) || PyTuple_Size(hit) != 3) {
        PyErr_Format(PyExc_TypeError, "an entry is the first address, that behind the last, and a buffer");
        return -1;
    }
    new.start = PyLong_AsUnsignedLongLong(PyTuple_GetItem(hit, 0));
    if ((new.start == UINT64_MAX && PyErr_Occurred()) || grow(front))
        return -1;
    held = PyMem_Malloc(sizeof(Held));
    if (!held) {
        PyErr_NoMemory();
        return -1;
    }
    if (PyObject_GetBuffer(PyTuple_GetItem(hit, 2), &held->bytes, PyBUF_SIMPLE)) {
        PyMem_Free(held);
        return -1;
    }
    held->hit = Py_NewRef(hit);
    new.held = held;
    new.bytes = held->bytes.buf;
    new.size = front->writable && held->bytes.readonly ? 0 : (uint64_t)held->bytes.len;
    old = find(front, new.page);
    held = old ? take_out(front, old) : NULL;
    put(front, &new);
    if (held)
        release(held);
    return 0;
}

/* pop(page, default): nobody wants what was there. */
static PyObject *front_pop(Front *front, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t page;
    Place *place;

    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "pop takes a page and a default");
    if (page_of(args[0], &page))
        return NULL;
    place = find(front, page);
    if (place) {
        Held *held = take_out(front, place);
        PyObject *hit = Py_NewRef(held->hit);
        release(held);
        return hit;
    }
    return Py_NewRef(args[1]);
}

static PyObject *front_clear(Front *front, PyObject *unused)
{
    (void)unused;
    empty(front);
    return Py_BuildValue("");
}

static Py_ssize_t front_length(Front *front)
{
    return (Py_ssize_t)front->used;
}

static void front_dealloc(Front *front)
{
    PyTypeObject *type = Py_TYPE((PyObject *)front);

    empty(front);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(front);
    Py_DECREF(type);
}

static PyObject *front_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Front *front;
    int writable;

    if (kwargs && PyDict_Size(kwargs))
        return PyErr_Format(PyExc_TypeError, "Front takes positional arguments only");
    if (!PyArg_ParseTuple(args, "p", &writable))
        return NULL;
    front = (Front *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (front)
        front->writable = writable;
    return (PyObject *)front;
}

#define FAST(type, name) {#name, (PyCFunction)(void (*)(void))type##_##name, METH_FASTCALL, NULL}

static PyMethodDef front_methods[] = {
    FAST(front, pop),
    {"get", (PyCFunction)(void (*)(void))front_get, METH_O, NULL},
    {"clear", (PyCFunction)(void (*)(void))front_clear, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot front_slots[] = {
    {Py_tp_new, (void *)front_new},
    {Py_tp_dealloc, (void *)front_dealloc},
    {Py_tp_methods, front_methods},
    {Py_mp_length, (void *)front_length},
    {Py_mp_ass_subscript, (void *)front_set},
    {0, NULL},
};

static PyType_Spec front_spec = {"vfio_model.memory._atc.Front", sizeof(Front), 0, Py_TPFLAGS_DEFAULT, front_slots};

typedef struct {
    PyObject_HEAD
    PyObject *slow_read, *slow_write, *slow_access, *ok, *moved_ok;
    PyObject *answer; /* what access() answered last, for `answered` bytes */
    uint64_t answered;
    int knows;
    Py_buffer ring_buffer, lane_buffer, seen_buffer, gate_buffer;
    Front *readable, *writable;
    const uint64_t *head, *seen;
    uint64_t *counter;
} Path;

static inline int open_gate(const Path *p)
{
    if (p->gate_buffer.len >= 8)
        return load(p->gate_buffer.buf) != 0;
    return *(const volatile char *)p->gate_buffer.buf != 0;
}

/* One DMA section. Returns how much was moved: all of it or nothing, unless a part is enough. */
static uint64_t section(const Path *p, uint64_t iova, void *bytes, uint64_t size, int to_ram, int part)
{
    const uint64_t count = load(p->counter);
    uint64_t moved = 0;

    if (count & 1)
        return 0;
    begin_section(p->counter, count);
    if (load(p->head) == *p->seen && open_gate(p)) {
        const Place *place = find(to_ram ? p->writable : p->readable, iova >> PAGE_SHIFT);
        const uint64_t within = place ? iova - place->start : 0;
        if (place && within < place->size) {
            const uint64_t room = place->size - within, most = room < SECTION_BYTES ? room : SECTION_BYTES;
            if (size > most && part)
                size = most;
            if (size <= most) {
                if (to_ram)
                    memmove(place->bytes + within, bytes, size);
                else
                    memmove(bytes, place->bytes + within, size);
                moved = size;
            }
        }
    }
    end_section(p->counter, count);
    return moved;
}

/* Bytes moved between `address` and `object`; 0 also where one of the two is not what it should be: the slow half knows
 * what to say of it. */
static uint64_t move(const Path *p, PyObject *address, PyObject *object, int to_ram, int part)
{
    Py_buffer bytes;
    uint64_t iova, moved = 0;

    if (!p->knows)
        return 0;
    iova = PyLong_AsUnsignedLongLong(address);
    if ((iova == UINT64_MAX && PyErr_Occurred()) ||
        PyObject_GetBuffer(object, &bytes, to_ram ? PyBUF_SIMPLE : PyBUF_WRITABLE)) {
        PyErr_Clear();
        return 0;
    }
    if (bytes.itemsize == 1 && bytes.len)
        moved = section(p, iova, bytes.buf, (uint64_t)bytes.len, to_ram, part);
    PyBuffer_Release(&bytes);
    return moved;
}

static PyObject *path_read(Path *p, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "read takes an iova and a buffer");
    if (move(p, args[0], args[1], 0, 0))
        return Py_NewRef(p->ok);
    return PyObject_CallFunctionObjArgs(p->slow_read, args[0], args[1], NULL);
}

static PyObject *path_write(Path *p, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2)
        return PyErr_Format(PyExc_TypeError, "write takes an iova and a buffer");
    if (move(p, args[0], args[1], 1, 0))
        return Py_NewRef(p->ok);
    return PyObject_CallFunctionObjArgs(p->slow_write, args[0], args[1], NULL);
}

static PyObject *path_access(Path *p, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t moved;
    int to_ram;

    if (nargs != 3)
        return PyErr_Format(PyExc_TypeError, "access takes an address, a buffer and a direction");
    to_ram = PyObject_IsTrue(args[2]);
    if (to_ram < 0)
        return NULL;
    moved = move(p, args[0], args[1], to_ram, 1);
    if (!moved)
        return PyObject_CallFunctionObjArgs(p->slow_access, args[0], args[1], args[2], NULL);
    if (!p->answer || moved != p->answered) {
        PyObject *answer = Py_BuildValue("(KO)", (unsigned long long)moved, p->moved_ok), *before = p->answer;
        if (!answer)
            return NULL;
        p->answer = answer, p->answered = moved;
        Py_XDECREF(before);
    }
    return Py_NewRef(p->answer);
}

static void forget(Path *p)
{
    Front *readable = p->readable, *writable = p->writable;

    if (!p->knows)
        return;
    p->knows = 0;
    p->readable = p->writable = NULL;
    PyBuffer_Release(&p->ring_buffer);
    PyBuffer_Release(&p->lane_buffer);
    PyBuffer_Release(&p->seen_buffer);
    PyBuffer_Release(&p->gate_buffer);
    Py_DECREF((PyObject *)readable);
    Py_DECREF((PyObject *)writable);
}

static PyObject *path_forget(Path *p, PyObject *unused)
{
    (void)unused;
    forget(p);
    return Py_BuildValue("");
}

static int short_or_crooked(const Py_buffer *words, unsigned long long last)
{
    return last >= (uint64_t)words->len / 8 || (uintptr_t)words->buf & 7;
}

static PyObject *path_know(Path *p, PyObject *args)
{
    PyObject *objects[4];
    Py_buffer *buffers[4] = {&p->ring_buffer, &p->lane_buffer, &p->seen_buffer, &p->gate_buffer};
    PyObject *readable, *writable;
    unsigned long long slot;
    int held;

    if (!PyArg_ParseTuple(args, "OOKOOO!O!", &objects[0], &objects[1], &slot, &objects[2], &objects[3], front_type,
                          &readable, front_type, &writable))
        return NULL;
    forget(p);
    for (held = 0; held < 4; held++)
        if (PyObject_GetBuffer(objects[held], buffers[held], held == 1 ? PyBUF_WRITABLE : PyBUF_SIMPLE))
            goto refused;
    if (short_or_crooked(&p->ring_buffer, HEAD) || short_or_crooked(&p->lane_buffer, slot) ||
        short_or_crooked(&p->seen_buffer, 0) || !p->gate_buffer.len ||
        (p->gate_buffer.len >= 8 && (uintptr_t)p->gate_buffer.buf & 7)) {
        PyErr_Format(PyExc_ValueError, "words of ring, lanes, reader or gate too short or not aligned");
        goto refused;
    }
    p->head = (const uint64_t *)p->ring_buffer.buf + HEAD;
    p->counter = (uint64_t *)p->lane_buffer.buf + slot;
    p->seen = p->seen_buffer.buf;
    p->readable = (Front *)Py_NewRef(readable), p->writable = (Front *)Py_NewRef(writable);
    p->knows = 1;
    return Py_BuildValue("");
refused:
    while (held--)
        PyBuffer_Release(buffers[held]);
    return NULL;
}

static int path_traverse(Path *p, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE((PyObject *)p));
    Py_VISIT(p->slow_read);
    Py_VISIT(p->slow_write);
    Py_VISIT(p->slow_access);
    Py_VISIT(p->ok);
    Py_VISIT(p->moved_ok);
    Py_VISIT(p->answer);
    return 0;
}

static int path_clear(Path *p)
{
    forget(p);
    Py_CLEAR(p->slow_read);
    Py_CLEAR(p->slow_write);
    Py_CLEAR(p->slow_access);
    Py_CLEAR(p->ok);
    Py_CLEAR(p->moved_ok);
    Py_CLEAR(p->answer);
    return 0;
}

static void path_dealloc(Path *p)
{
    PyTypeObject *type = Py_TYPE((PyObject *)p);

    PyObject_GC_UnTrack(p);
    path_clear(p);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(p);
    Py_DECREF(type);
}

static PyObject *path_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *slow_read, *slow_write, *slow_access, *ok, *moved_ok;
    Path *p;

    if (kwargs && PyDict_Size(kwargs))
        return PyErr_Format(PyExc_TypeError, "Path takes positional arguments only");
    if (!PyArg_ParseTuple(args, "OOOOO", &slow_read, &slow_write, &slow_access, &ok, &moved_ok))
        return NULL;
    p = (Path *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (!p)
        return NULL;
    p->slow_read = Py_NewRef(slow_read);
    p->slow_write = Py_NewRef(slow_write);
    p->slow_access = Py_NewRef(slow_access);
    p->ok = Py_NewRef(ok);
    p->moved_ok = Py_NewRef(moved_ok);
    return (PyObject *)p;
}

static PyMethodDef path_methods[] = {
    FAST(path, read),
    FAST(path, write),
    FAST(path, access),
    {"know", (PyCFunction)(void (*)(void))path_know, METH_VARARGS, NULL},
    {"forget", (PyCFunction)(void (*)(void))path_forget, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot path_slots[] = {
    {Py_tp_new, (void *)path_new},           {Py_tp_dealloc, (void *)path_dealloc}, {Py_tp_methods, path_methods},
    {Py_tp_traverse, (void *)path_traverse}, {Py_tp_clear, (void *)path_clear},     {0, NULL},
};

static PyType_Spec path_spec = {
    "vfio_model.memory._atc.Path", sizeof(Path), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC, path_slots,
};

static int add_type(PyObject *module, const char *name, PyType_Spec *spec, PyTypeObject **keep)
{
    PyObject *type = PyType_FromSpec(spec);

    if (!type)
        return -1;
    if (PyModule_AddObjectRef(module, name, type)) {
        Py_DECREF(type);
        return -1;
    }
    if (keep)
        *keep = (PyTypeObject *)type; /* and its reference: the type stays as long as the process */
    else
        Py_DECREF(type);
    return 0;
}

static int add_types(PyObject *module)
{
    return add_type(module, "Front", &front_spec, &front_type) || add_type(module, "Path", &path_spec, NULL) ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_types}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "vfio_model.memory._atc", "See _atc.pyi.", 0, NULL, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__atc(void)
{
    return PyModuleDef_Init(&definition);
}
