/* The compiled variant of the batches: translation through a single-level table of TCEs, and DMA of equal-sized pieces.
 *
 * An entry is a u64: page address | permission (1 the device may read, 2 it may write); LoPAPR, "TCE Tables and TCE".
 * vfio_model/batch/tables.py says in plain Python what the functions mean; results equal it.
 *
 * What must not be broken: addresses are u64 and wrap as the bus does, so every test is one on unsigned numbers that
 * cannot overflow. An entry is loaded once, as a whole word, since the host may change it meanwhile, and every decision
 * about a piece is made on the value that was loaded. gather() and scatter() run inside a DMA section: they neither
 * release the interpreter lock nor keep anything.
 *
 * Only the limited API is used, so that one library serves every CPython from 3.11 on. Mappings: _compiled_maps.c;
 * tables of several levels: _compiled_walks.c.
 */
#include "_compiled.h"

#define PERM_MASK 3u
#define MAY_READ 1u
#define MAY_WRITE 2u
/* Batches beyond this many addresses release the interpreter lock. */
#define LONG_BATCH 65536
/* A table is larger than the nearest cache: its entries are fetched so many addresses ahead. */
#define AHEAD 32

/* A single-level table over the window that begins at `start`; `low` masks the offset in a page. */
typedef struct {
    Py_buffer buffer;
    const uint64_t *entries;
    uint64_t count, start, low;
    unsigned shift;
} Table;

/* Arguments 0..2 of every function: table, start, page_shift. */
static int take_table(PyObject *const *args, Table *table)
{
    uint64_t shift;

    if (take_u64(args[1], &table->start) || take_u64(args[2], &shift))
        return -1;
    if (shift < 2 || shift > 63)
        return refuse("page_shift", "it lies in 2..63: two bits of an entry are its permission");
    table->shift = (unsigned)shift;
    table->low = (UINT64_C(1) << shift) - 1;
    if (take_words(args[0], &table->buffer, 0, "table"))
        return -1;
    if (table->buffer.len && (uintptr_t)table->buffer.buf & 7) {
        PyBuffer_Release(&table->buffer);
        return refuse("table", "its words are not aligned");
    }
    table->entries = table->buffer.buf;
    table->count = (uint64_t)table->buffer.len / 8;
    return 0;
}

/* The entry of `iova` as it is now. Returns 0 outside the window. */
static inline int load(const Table *table, uint64_t iova, uint64_t *entry)
{
    uint64_t index = (iova - table->start) >> table->shift;

    if (index >= table->count)
        return 0;
    *entry = __atomic_load_n(table->entries + index, __ATOMIC_RELAXED);
    return 1;
}

/* Outside the window it fetches nothing useful, and is harmless. */
static inline void fetch(const Table *table, uint64_t iova)
{
    __builtin_prefetch((const void *)((uintptr_t)table->entries + ((iova - table->start) >> table->shift) * 8));
}

/* The AND of all permissions, or -1 when an address lies outside. */
static int translate_all(const Table *table, const void *iovas, void *out, size_t count)
{
    const Table t = *table;
    uint64_t entry, perms = PERM_MASK;

    for (size_t i = 0; i < count; i++) {
        uint64_t iova = word(iovas, i);
        if (i + AHEAD < count)
            fetch(&t, word(iovas, i + AHEAD));
        if (!load(&t, iova, &entry))
            return -1;
        perms &= entry;
        put(out, i, (entry & ~t.low) | (iova & t.low));
    }
    return (int)perms;
}

static PyObject *translate(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Table table;
    Py_buffer iovas, out;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 5)
        return PyErr_Format(PyExc_TypeError, "translate takes table, start, page_shift, iovas, out");
    if (take_table(args, &table))
        return NULL;
    if (take_words(args[3], &iovas, 0, "iovas"))
        goto no_iovas;
    if (take_words(args[4], &out, PyBUF_WRITABLE, "out"))
        goto no_out;
    if (out.len != iovas.len) {
        refuse("out", "as many words as iovas are needed");
    } else {
        size_t count = (size_t)iovas.len / 8;
        int perms;
        if (count > LONG_BATCH) {
            Py_BEGIN_ALLOW_THREADS
            perms = translate_all(&table, iovas.buf, out.buf, count);
            Py_END_ALLOW_THREADS
        } else {
            perms = translate_all(&table, iovas.buf, out.buf, count);
        }
        result = Py_BuildValue("Oi", perms < 0 ? Py_False : Py_True, perms < 0 ? 0 : perms);
    }
    PyBuffer_Release(&out);
no_out:
    PyBuffer_Release(&iovas);
no_iovas:
    PyBuffer_Release(&table.buffer);
    return result;
}

static PyObject *translate_each(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Table table;
    Py_buffer iovas, out, perms;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 6)
        return PyErr_Format(PyExc_TypeError, "translate_each takes table, start, page_shift, iovas, out, perms");
    if (take_table(args, &table))
        return NULL;
    if (take_words(args[3], &iovas, 0, "iovas"))
        goto no_iovas;
    if (take_words(args[4], &out, PyBUF_WRITABLE, "out"))
        goto no_out;
    if (take(args[5], &perms, PyBUF_WRITABLE, "perms"))
        goto no_perms;
    if (out.len != iovas.len || perms.len != iovas.len / 8) {
        refuse("out and perms", "as many words and bytes as iovas are needed");
    } else {
        uint8_t *each = perms.buf;
        for (size_t i = 0; i < (size_t)iovas.len / 8; i++) {
            uint64_t iova = word(iovas.buf, i), entry = 0;
            int inside = load(&table, iova, &entry);
            each[i] = (uint8_t)(entry & PERM_MASK);
            put(out.buf, i, inside ? (entry & ~table.low) | (iova & table.low) : 0);
        }
        result = Py_BuildValue("");
    }
    PyBuffer_Release(&perms);
no_perms:
    PyBuffer_Release(&out);
no_out:
    PyBuffer_Release(&iovas);
no_iovas:
    PyBuffer_Release(&table.buffer);
    return result;
}

/* Pieces of `size` bytes: where they are in `ram` says the table, where they are in `pieces` their number. */
typedef struct {
    Table table;
    Py_buffer ram, iovas, pieces;
    uint64_t base, size, first, stop;
} Move;

/* Moves first..stop-1 in order and returns how many went before one that may not, cannot, or leaves its page. */
static uint64_t move_pieces(const Move *move, int to_ram)
{
    const Table table = move->table;
    const uint64_t size = move->size, need = to_ram ? MAY_WRITE : MAY_READ, room = (uint64_t)move->ram.len;
    uint8_t *ram = move->ram.buf, *pieces = move->pieces.buf;
    uint64_t entry;

    for (uint64_t i = move->first; i < move->stop; i++) {
        uint64_t iova = word(move->iovas.buf, i), within = iova & table.low, at;
        if (size > table.low + 1 - within || !load(&table, iova, &entry) || !(entry & need))
            return i - move->first;
        at = (entry & ~table.low) - move->base + within;
        if (at >= room || size > room - at)
            return i - move->first;
        if (to_ram)
            memmove(ram + at, pieces + i * size, size);
        else
            memmove(pieces + i * size, ram + at, size);
    }
    return move->stop - move->first;
}

static int check_move(const Move *move)
{
    if (!move->size)
        return refuse("size", "pieces have at least one byte");
    if (move->first > move->stop || move->stop > (uint64_t)move->iovas.len / 8)
        return refuse("stop", "it lies between first and the number of iovas");
    if (move->stop > (uint64_t)move->pieces.len / move->size)
        return refuse("stop", "the buffer does not hold so many pieces");
    return 0;
}

static PyObject *move_many(PyObject *const *args, Py_ssize_t nargs, int to_ram)
{
    Move move;
    PyObject *result = NULL;

    if (nargs != 10)
        return PyErr_Format(PyExc_TypeError, "%s takes table, start, page_shift, base, ram, iovas, size, %s, first, stop",
                            to_ram ? "scatter" : "gather", to_ram ? "data" : "out");
    if (take_u64(args[3], &move.base) || take_u64(args[6], &move.size) || take_u64(args[8], &move.first) ||
        take_u64(args[9], &move.stop) || take_table(args, &move.table))
        return NULL;
    if (take(args[4], &move.ram, to_ram ? PyBUF_WRITABLE : PyBUF_SIMPLE, "ram"))
        goto no_ram;
    if (take_words(args[5], &move.iovas, 0, "iovas"))
        goto no_iovas;
    if (take(args[7], &move.pieces, to_ram ? PyBUF_SIMPLE : PyBUF_WRITABLE, to_ram ? "data" : "out"))
        goto no_pieces;
    if (check_move(&move) == 0)
        result = PyLong_FromUnsignedLongLong(move_pieces(&move, to_ram));
    PyBuffer_Release(&move.pieces);
no_pieces:
    PyBuffer_Release(&move.iovas);
no_iovas:
    PyBuffer_Release(&move.ram);
no_ram:
    PyBuffer_Release(&move.table.buffer);
    return result;
}

static PyObject *gather(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    return move_many(args, nargs, 0);
}

static PyObject *scatter(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    (void)module;
    return move_many(args, nargs, 1);
}

static PyMethodDef functions[] = {
    FUNCTION(translate), FUNCTION(translate_each), FUNCTION(gather), FUNCTION(scatter), {NULL, NULL, 0, NULL},
};

static int add_others(PyObject *module)
{
    return PyModule_AddFunctions(module, map_functions) || PyModule_AddFunctions(module, walk_functions) ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, (void *)add_others}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "vfio_model.batch._compiled", "See _compiled.pyi.", 0, functions, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__compiled(void)
{
    return PyModuleDef_Init(&definition);
}
