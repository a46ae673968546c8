/* The compiled variant of walks through tables of several levels; vfio_model/batch/walks.py says in plain Python what
 * they mean.
 *
 * A batch goes down level by level, so that the entries of a level do not wait for each other: one walk after the other
 * waits for memory at each of its levels. Where a walk is, is kept in the place of its result. As long as all of a part
 * do the same (every entry is there, has the same permission, and is a table, or is a page), nothing is decided for each;
 * else the part goes down again, each on its own.
 *
 * What must not be broken: an entry is loaded once, as a whole word, since the guest may change it meanwhile. Every index
 * is checked against the RAM that was given, as an unsigned number; the interpreter lock is kept, since that RAM could
 * go.
 */
#include "_compiled.h"

#define LARGE 0x80u
#define LEVELS_MAX 5
/* Addresses that go down together: their places stay in the nearest cache. */
#define TOGETHER 1024
#define AHEAD 16
#define GOING 0x80u

/* The words of WalkSpec, in its order. */
typedef struct {
    uint64_t root, levels, width, is_signed, want, required, leaf_required, address, hole_first, hole_last;
    uint64_t plain[LEVELS_MAX + 1], large[LEVELS_MAX + 1];
} Spec;

typedef struct {
    const uint8_t *ram;
    uint64_t base, bytes;
    Spec spec;
} Walk;

static inline int inside(const Spec *spec, uint64_t iova)
{
    uint64_t above;

    if (spec->width == 64)
        return 1;
    above = iova >> (spec->width - spec->is_signed);
    return !above || (spec->is_signed && above == UINT64_MAX >> (spec->width - 1));
}

static inline uint64_t place(uint64_t table, uint64_t iova, unsigned level)
{
    return table + (iova >> (9 * level) & 0xff8);
}

/* Where glibc can choose among functions, those that only compute are there for wider registers, too. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

/* Tables become offsets in RAM of their entries; whether one lies beyond `last`. Such a place has bit 63, or what is left
 * behind it has: RAM has less than 2^63 bytes. */
WIDE static int places(uint64_t *at, const char *iovas, unsigned level, uint64_t base, uint64_t last, size_t count)
{
    uint64_t outside = 0;

    for (size_t i = 0; i < count; i++) {
        uint64_t there = (place(at[i], word(iovas, i), level) - base) & ~UINT64_C(7);

        outside |= there | (last - there);
        at[i] = there;
    }
    return (int)(outside >> 63);
}

/* Addresses in pages of `low` + 1 bytes into `out`; whether a page meets the hole. */
WIDE static int pages(const uint64_t *at, const char *iovas, char *out, uint64_t low, const Spec *spec, size_t count)
{
    const uint64_t first = spec->hole_first & ~low, size = spec->hole_last - first;
    int hole = 0;

    for (size_t i = 0; i < count; i++) {
        uint64_t page = at[i] & ~low;

        hole |= page - first <= size;
        put(out, i, page | (word(iovas, i) & low));
    }
    return hole;
}

/* The part's addresses into `out`; their permission, or -1 when they are not alike. */
static int walk_alike(const Walk *walk, const char *iovas, char *out, size_t count)
{
    const Spec *spec = &walk->spec;
    const uint64_t last = walk->bytes - 8, address = spec->address, base = walk->base;
    const uint8_t *ram = walk->ram;
    const unsigned above = 64 - (unsigned)spec->width;
    uint64_t at[TOGETHER], perm = 3, outside = 0;

    if (spec->is_signed)
        for (size_t i = 0; i < count; i++)
            outside |= (uint64_t)((int64_t)(word(iovas, i) << above) >> above) ^ word(iovas, i);
    else
        for (size_t i = 0; i < count; i++)
            outside |= word(iovas, i) << above >> above ^ word(iovas, i);
    if (outside)
        return -1;
    for (size_t i = 0; i < count; i++)
        at[i] = spec->root;
    for (unsigned level = (unsigned)spec->levels; level; level--) {
        const uint64_t low = (UINT64_C(1) << (3 + 9 * level)) - 1;
        uint64_t some = 0, every = UINT64_MAX, needed, reserved;
        int leaf;

        if (places(at, iovas, level, base, last, count))
            return -1;
        for (size_t i = 0; i < count; i++) {
            const uint64_t *entry = (const uint64_t *)(const void *)(ram + at[i]);
            uint64_t value = __atomic_load_n(entry, __ATOMIC_RELAXED);

            some |= value;
            every &= value;
            at[i] = value & address;
        }
        leaf = level == 1 || every & LARGE;
        reserved = leaf ? (level > 1 ? spec->large[level] : spec->plain[1]) : spec->plain[level] | LARGE;
        needed = spec->required | (leaf ? spec->leaf_required : 0);
        perm &= every;
        if ((needed & ~every) | (some & reserved) | (spec->want & ~perm) | ((some ^ every) & 3) || !perm)
            return -1;
        if (!leaf)
            continue;
        return pages(at, iovas, out, low, spec, count) ? -1 : (int)perm;
    }
    return -1;
}

/* One level for `count` walks: `tables` become the next tables, or the addresses that were reached. */
static void step(const Walk *walk, unsigned level, const char *iovas, char *tables, uint8_t *perms, size_t count)
{
    const Spec *spec = &walk->spec;
    const uint64_t low = (UINT64_C(1) << (3 + 9 * level)) - 1, last = walk->bytes - 8;
    const uint64_t plain = spec->plain[level], large = level > 1 ? spec->large[level] : plain;

    for (size_t i = 0; i < count; i++) {
        uint64_t iova, at, entry, needed, page;
        unsigned perm = perms[i];
        int leaf;

        if (i + AHEAD < count) {
            at = place(word(tables, i + AHEAD), word(iovas, i + AHEAD), level) - walk->base;
            __builtin_prefetch((const void *)((uintptr_t)walk->ram + at));
        }
        if (!(perm & GOING))
            continue;
        iova = word(iovas, i);
        at = (place(word(tables, i), iova, level) - walk->base) & ~UINT64_C(7);
        perms[i] = 0;
        if (at > last)
            continue;
        entry = __atomic_load_n((const uint64_t *)(const void *)(walk->ram + at), __ATOMIC_RELAXED);
        leaf = level == 1 || entry & LARGE;
        needed = spec->required | (leaf ? spec->leaf_required : 0);
        perm &= (unsigned)entry & 3;
        if ((needed & ~entry) | (entry & (leaf ? large : plain)) | (spec->want & ~(uint64_t)perm) || !perm)
            continue;
        page = entry & spec->address;
        if (!leaf) {
            perms[i] = (uint8_t)(perm | GOING);
        } else {
            page &= ~low;
            if (page <= spec->hole_last && (page | low) >= spec->hole_first)
                continue;
            page |= iova & low;
            perms[i] = (uint8_t)perm;
        }
        put(tables, i, page);
    }
}

static void walk_some(const Walk *walk, const char *iovas, char *out, uint8_t *perms, size_t count)
{
    int alike = walk->bytes < 8 ? -1 : walk_alike(walk, iovas, out, count);

    if (alike >= 0) {
        memset(perms, alike, count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        perms[i] = inside(&walk->spec, word(iovas, i)) ? GOING | 3 : 0;
        put(out, i, walk->spec.root);
    }
    if (walk->bytes < 8)
        memset(perms, 0, count);
    else
        for (unsigned level = (unsigned)walk->spec.levels; level; level--)
            step(walk, level, iovas, out, perms, count);
    for (size_t i = 0; i < count; i++)
        if (!perms[i])
            put(out, i, 0);
}

static int check_spec(const Walk *walk)
{
    const Spec *spec = &walk->spec;

    if (spec->levels < 1 || spec->levels > LEVELS_MAX)
        return refuse("spec", "there are 1 to 5 levels");
    if (spec->width < 1 || spec->width > 64)
        return refuse("spec", "an address has 1 to 64 bits");
    if (spec->is_signed > 1)
        return refuse("spec", "signed is 0 or 1");
    if (spec->hole_last < spec->hole_first)
        return refuse("spec", "the hole ends before it begins");
    return walk->bytes && (uintptr_t)walk->ram & 7 ? refuse("ram", "its words are not aligned") : 0;
}

static PyObject *walk(PyObject *module, PyObject *const *args, Py_ssize_t nargs)
{
    Walk walk;
    Py_buffer ram, iovas, out, perms, spec;
    PyObject *result = NULL;

    (void)module;
    if (nargs != 6)
        return PyErr_Format(PyExc_TypeError, "walk takes ram, base, iovas, out, perms, spec");
    if (take_u64(args[1], &walk.base) || take_words(args[0], &ram, 0, "ram"))
        return NULL;
    if (take_words(args[2], &iovas, 0, "iovas"))
        goto no_iovas;
    if (take_words(args[3], &out, PyBUF_WRITABLE, "out"))
        goto no_out;
    if (take(args[4], &perms, PyBUF_WRITABLE, "perms"))
        goto no_perms;
    if (take_words(args[5], &spec, 0, "spec"))
        goto no_spec;
    walk.ram = ram.buf;
    walk.bytes = (uint64_t)ram.len;
    if (out.len != iovas.len || perms.len != iovas.len / 8) {
        refuse("out and perms", "as many words and bytes as iovas are needed");
    } else if (spec.len != (Py_ssize_t)sizeof(walk.spec)) {
        refuse("spec", "it has 22 words");
    } else {
        memcpy(&walk.spec, spec.buf, sizeof(walk.spec));
        if (check_spec(&walk) == 0) {
            size_t count = (size_t)iovas.len / 8;
            for (size_t at = 0; at < count; at += TOGETHER)
                walk_some(&walk, (const char *)iovas.buf + at * 8, (char *)out.buf + at * 8, (uint8_t *)perms.buf + at,
                          count - at < TOGETHER ? count - at : TOGETHER);
            result = Py_BuildValue("");
        }
    }
    PyBuffer_Release(&spec);
no_spec:
    PyBuffer_Release(&perms);
no_perms:
    PyBuffer_Release(&out);
no_out:
    PyBuffer_Release(&iovas);
no_iovas:
    PyBuffer_Release(&ram);
    return result;
}

PyMethodDef walk_functions[] = {FUNCTION(walk), {NULL, NULL, 0, NULL}};
